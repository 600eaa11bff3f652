"""Which runners there are, by name, and how an engine is opened with one: one line a runner.

torch    the reference: transformers' model over a paged cache, on any device
native   the data plane in C++, on the processor: codes times bytes, a whole step in one call
auto     native where it is built and runs the model, else torch: the default

Inputs of compressed linears are bytes in the native runner and keys and values have 16 or 8 bits, so its greedy tokens
are torch's but for near ties; for the reference's own, ask for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fettle.engine.engine import Engine
from fettle.engine.names import AUTO, ENGINE_NAMES
from fettle.engine.native_runner import CacheType, NativeRunner, require_native
from fettle.engine.payoff import Payoff
from fettle.engine.prompts import Vocabulary
from fettle.engine.runner import Runner
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.speculative import Drafter, DraftModel, PromptLookup, scratch_pages
from fettle.engine.torch_runner import TorchRunner
from fettle.errors import UsageError, unknown_word
from fettle.kernels.native import missing, plane
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import context_length
from fettle.models.loading import load
from fettle.models.source import resolve

DEFAULT_CACHE_TOKENS = 8192
LOOKUP = "lookup"  # in place of a draft model: guess from the text itself


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How a runner is opened.

    Attributes:
        page_size: tokens a page of the cache.
        cache_tokens: how many tokens the cache holds; None: 8192, or the model's context where that is less.
        threads: how many to compute with; None: as many as the library takes.
        device: "cpu", "cuda" or "cuda:N".
        generic: treat every linear of an unknown architecture alike.
        cache_type: what the native runner keeps keys and values in: float16, float32, or int8 with a scale a token and
            head; None: float16. The torch runner's are in the model's type.
    """

    page_size: int = 16
    cache_tokens: int | None = None
    threads: int | None = None
    device: str = "cpu"
    generic: bool = False
    cache_type: CacheType | None = None

    def pages(self, context: int | None) -> int:
        """How many pages the cache has, for a model with this context.

        Raises:
            UsageError: a number below 1.
        """
        for name, value in (
            ("page_size", self.page_size),
            ("cache_tokens", self.cache_tokens),
            ("threads", self.threads),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        tokens = self.cache_tokens or min(DEFAULT_CACHE_TOKENS, context or DEFAULT_CACHE_TOKENS)
        return -(-tokens // self.page_size)


Opener = Callable[[Path, RunnerOptions], Runner]  # the folder of a checkpoint → its runner


def open_torch_runner(folder: Path, options: RunnerOptions) -> Runner:
    """The reference runner."""
    if options.cache_type is not None:
        raise UsageError(
            f"cache_type {options.cache_type} is the native engine's; use --engine native, or leave it out"
        )
    pages = options.pages(context_length(Checkpoint.open(folder).config))
    loaded = load(folder, device=options.device, generic=options.generic)
    return TorchRunner(loaded, pages=pages, page_size=options.page_size, threads=options.threads)


def _check_native(options: RunnerOptions) -> None:
    if options.device != "cpu" or options.generic:
        what = "--generic" if options.generic else f"--device {options.device}"
        raise UsageError(f"the native engine does not run with {what}; use --engine torch")


def open_native_runner(folder: Path, options: RunnerOptions) -> Runner:
    """The runner of the native data plane.

    Raises:
        UsageError: another device than the processor, a model that it has no parts for, or it is not built.
    """
    _check_native(options)
    pages = options.pages(context_length(Checkpoint.open(folder).config))
    return NativeRunner.open(
        folder,
        pages=pages,
        page_size=options.page_size,
        threads=options.threads,
        cache_type=options.cache_type or "float16",
    )


ENGINES: dict[str, Opener] = {"torch": open_torch_runner, "native": open_native_runner}


def choose_engine(engine: str, folder: Path, options: RunnerOptions) -> tuple[str, str | None]:
    """The name of the runner that an engine's name means for a model, and why it is not the native one.

    Returns:
        (key of `ENGINES`, reason): a sentence where "auto" fell back to torch, else None.

    Raises:
        UsageError: an unknown name.
        ModelError: damaged files.
    """
    if engine not in ENGINE_NAMES:
        raise UsageError(unknown_word("engine", engine, ENGINE_NAMES))
    if engine != AUTO:
        return engine, None
    if missing() is None:
        plane()  # FETTLE_INSTRUCTIONS with a wrong name is a mistake, and no reason to take torch
    try:
        _check_native(options)
        require_native(folder)
    except UsageError as error:
        return "torch", str(error).partition("; use --engine")[0].partition(". Use --engine")[0]
    return "native", None


def open_engine(
    model: str | Path,
    *,
    engine: str = AUTO,
    runner: RunnerOptions | None = None,
    scheduler: SchedulerOptions | None = None,
    draft: str | Path | None = None,
    draft_tokens: int = 4,
) -> Engine:
    """An engine that serves a model.

    Args:
        model: "demo", a folder or a hub id, compressed or not.
        engine: the runner's name, one of `ENGINE_NAMES`; `choose_engine` tells what "auto" takes.
        runner: how it is opened: cache, threads, device.
        scheduler: how much runs at once.
        draft: what guesses tokens: a smaller model with the same vocabulary, "lookup" for the text itself, or nothing.
        draft_tokens: how many are guessed at most.

    Raises:
        UsageError: a name or number that cannot be, an encoder, or a draft model with another vocabulary.
        ModelError: damaged files.
    """
    folder, options = resolve(model), runner or RunnerOptions()
    chosen, _ = choose_engine(engine, folder, options)
    opened = ENGINES[chosen](folder, options)
    drafter = payoff = None
    if draft is not None:
        drafter, payoff = open_drafter(draft, opened, engine, options), Payoff(draft_tokens)
    vocabulary = Vocabulary.of_folder(folder, generic=options.generic)
    return Engine(opened, vocabulary, scheduler, drafter=drafter, payoff=payoff)


def open_drafter(draft: str | Path, target: Runner, engine: str, options: RunnerOptions) -> Drafter:
    """What guesses for `target`: "lookup" or a draft model with a cache of the same pages, and some to rehearse in."""
    if draft == LOOKUP:
        return PromptLookup()
    shape = target.shape
    alike = RunnerOptions(
        page_size=shape.page_size,
        cache_tokens=(shape.pages + scratch_pages(shape.page_size)) * shape.page_size,
        threads=options.threads,
        device=options.device,
        generic=options.generic,
        cache_type=options.cache_type,
    )
    folder = resolve(draft)
    return DraftModel(ENGINES[choose_engine(engine, folder, alike)[0]](folder, alike), target)
