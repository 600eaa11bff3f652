"""A whole compression: what it writes, how it resumes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

import fettle
from fettle.errors import CheckpointError, DiskFullError, ModelError, NonFiniteError, ResumeError, UsageError
from fettle.models.checkpoint import Checkpoint
from fettle.pipeline.journal import run_folder
from fettle.pipeline.recipe import parse_recipe
from fettle.pipeline.run import prepare

from ..apart import Ended, run_apart, signal_at_sync
from ..parity.tiny_models import TINY, write_model
from .conftest import digests, make_recipe

PLAIN = parse_recipe({"name": "plain", "steps": [{"method": "round_to_nearest"}]}, "test")


def test_the_written_folder_is_whole_and_says_what_it_is(tiny_llama, small_recipe, tmp_path):
    result = fettle.compress(tiny_llama, tmp_path / "out", small_recipe, evaluate=False)
    names = {p.name for p in result.folder.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "README.md", "fettle.json"} <= names
    marker = json.loads((result.folder / "fettle.json").read_text())
    assert marker["recipe"]["name"] == "small"
    checkpoint = Checkpoint.open(result.folder)
    assert checkpoint.verify_hashes() == len(checkpoint.entries)
    assert len(marker["ledger"]) == 2 * 7
    assert all(0 < line["error"] < 0.2 for line in marker["ledger"])
    assert not list(run_folder(result.folder).glob("inputs-*"))  # nothing large is left behind


def test_plan_predicts_the_bytes_exactly(tiny_llama, text_file, tmp_path):
    for changes in ({}, {"bits": 3, "group_size": 24}, {"asymmetric": False, "group_size": None, "bits": 8}):
        recipe = make_recipe(text_file, **changes)
        plan = fettle.plan(tiny_llama, recipe)
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        fettle.compress(tiny_llama, out, recipe, evaluate=False)
        written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        assert plan.output_bytes == written
        assert plan.shards == {p.name: p.stat().st_size for p in sorted(out.glob("*.safetensors"))}


def test_threads_and_repetition_do_not_change_a_byte(tiny_llama, small_recipe, tmp_path):
    for threads in (1, 2, 2):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "model"
        fettle.compress(tiny_llama, out, small_recipe, threads=threads)
    first, *others = [digests(p / "model") for p in sorted(tmp_path.iterdir())]
    assert all(other == first for other in others)


def test_a_finished_run_is_not_done_again(tiny_llama, small_recipe, tmp_path):
    first = fettle.compress(tiny_llama, tmp_path / "out", small_recipe)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = fettle.compress(tiny_llama, tmp_path / "out", small_recipe)
    assert again.resumed_whole and not first.resumed_whole
    assert again.evaluation == first.evaluation
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def compress_until(model: Path, out: Path, text: Path, at: int, number: int) -> None:
    """Compresses, unless the durable write `at` comes first and with it the signal; prints how many there were."""
    writes = signal_at_sync(at, number)
    fettle.compress(model, out, make_recipe(text), evaluate=False, threads=1)
    print(writes())


def killed_run(model: Path, out: Path, text: Path, at: int, number: int = signal.SIGKILL) -> Ended:
    out.parent.mkdir(exist_ok=True)
    return run_apart(compress_until, model, out, text, at, number, folder=out.parent)


def check_kill_and_resume(model: Path, text: Path, folder: Path, at: int, expected: dict[str, str]) -> None:
    out = folder / f"killed-{at}" / "model"
    run = killed_run(model, out, text, at)
    assert run.code == -signal.SIGKILL, run.said
    if (out / "fettle.json").exists():  # the marker comes last: whatever has it is whole
        assert digests(out) == expected
    if not (out / "config.json").exists():
        with pytest.raises(CheckpointError):
            Checkpoint.open(out)  # it does not look finished
    fettle.compress(model, out, make_recipe(text), evaluate=False)
    assert digests(out) == expected


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, text_file, tmp_path_factory):
    """The digests of a run that nobody kills, and how many durable writes it makes."""
    out = tmp_path_factory.mktemp("whole") / "model"
    run = killed_run(tiny_llama, out, text_file, -1)
    assert run.code == 0, run.said
    return digests(out), int(run.said.split()[-1])


@pytest.mark.parametrize("share", [0.2, 0.45, 0.8])
def test_a_killed_run_resumes_to_the_same_bytes(tiny_llama, text_file, undisturbed, tmp_path, share):
    expected, writes = undisturbed
    check_kill_and_resume(tiny_llama, text_file, tmp_path, max(1, round(share * writes)), expected)


@pytest.mark.exhaustive
def test_a_kill_at_every_durable_write_resumes_to_the_same_bytes(tiny_llama, text_file, undisturbed, tmp_path):
    expected, writes = undisturbed
    for at in range(1, writes + 1):
        check_kill_and_resume(tiny_llama, text_file, tmp_path, at, expected)


@pytest.fixture()
def interrupted(tiny_llama, text_file, tmp_path):
    """A folder with a run that was killed half way."""
    out = tmp_path / "model"
    assert killed_run(tiny_llama, out, text_file, 8).code == -signal.SIGKILL
    return out


def test_a_resumed_run_must_be_the_same_run(tiny_llama, text_file, interrupted, tmp_path):
    with pytest.raises(ResumeError, match=r"recipe.steps\[0\].bits: was 4, is now 3"):
        fettle.compress(tiny_llama, interrupted, make_recipe(text_file, bits=3), evaluate=False)
    recipe = make_recipe(text_file)
    seeded = parse_recipe(recipe.to_dict() | {"calibration": recipe.to_dict()["calibration"] | {"seed": 1}}, "test")
    with pytest.raises(ResumeError, match=r"calibration\.seed: was 0, is now 1"):
        fettle.compress(tiny_llama, interrupted, seeded, evaluate=False)
    other_text = tmp_path / "other.txt"
    other_text.write_text(text_file.read_text() + "\n# another end\n")
    with pytest.raises(ResumeError, match="text: was"):
        fettle.compress(tiny_llama, interrupted, make_recipe(other_text), evaluate=False)
    other_model = tmp_path / "other-model"
    shutil.copytree(tiny_llama, other_model)
    config = json.loads((other_model / "config.json").read_text())
    (other_model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    with pytest.raises(ResumeError, match=r"model\.config\.json: was"):
        fettle.compress(other_model, interrupted, recipe, evaluate=False)
    fettle.compress(tiny_llama, interrupted, make_recipe(text_file, bits=3), evaluate=False, fresh=True)
    assert json.loads((interrupted / "fettle.json").read_text())["recipe"]["steps"][0]["bits"] == 3


def test_lost_inputs_start_the_run_over_with_the_same_bytes(tiny_llama, text_file, undisturbed, interrupted):
    for path in run_folder(interrupted).glob("inputs-*"):
        path.unlink()
    fettle.compress(tiny_llama, interrupted, make_recipe(text_file), evaluate=False)
    assert digests(interrupted) == undisturbed[0]


def test_a_shard_that_was_cut_short_is_written_again(tiny_llama, text_file, undisturbed, interrupted):
    shard = sorted(interrupted.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    fettle.compress(tiny_llama, interrupted, make_recipe(text_file), evaluate=False)
    assert digests(interrupted) == undisturbed[0]


def test_a_full_disk_is_told_before_any_work_and_resumes(tiny_llama, small_recipe, tmp_path, monkeypatch, undisturbed):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=4000))
    out = tmp_path / "model"
    with pytest.raises(DiskFullError, match=r"model-00001-of-00003.safetensors.*bytes are missing"):
        fettle.compress(tiny_llama, out, small_recipe, evaluate=False)
    monkeypatch.undo()
    fettle.compress(tiny_llama, out, small_recipe, evaluate=False)
    assert digests(out) == undisturbed[0]


def test_foreign_folders_are_left_alone(tiny_llama, small_recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    for fresh in (False, True):
        with pytest.raises(UsageError, match="not empty"):
            fettle.compress(tiny_llama, tmp_path / "mine", small_recipe, fresh=fresh)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        fettle.compress(tiny_llama, tmp_path / "file", small_recipe)


def corrupted(model: Path, folder: Path, value: float) -> Path:
    """A copy of the model with one weight of block 1 set to `value`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_stops_the_run_by_name(tiny_llama, text_file, tmp_path, value):
    model = corrupted(tiny_llama, tmp_path / "bad", value)
    for method in ("gptq", "round_to_nearest"):
        recipe = parse_recipe(
            {"steps": [{"method": method}], "calibration": {"windows": 2, "length": 16, "text": str(text_file)}}, "t"
        )
        with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            fettle.compress(model, tmp_path / method, recipe, evaluate=False)


def test_activations_that_overflow_stop_the_run_by_block(tiny_llama, text_file, tmp_path):
    model = corrupted(tiny_llama, tmp_path / "big", 3e38)
    recipe = make_recipe(text_file)
    with pytest.raises(NonFiniteError, match=r"block 1|layers\.1"):
        fettle.compress(model, tmp_path / "out", recipe, evaluate=False)


def test_a_compressed_model_is_not_compressed_again(tiny_llama, small_recipe, tmp_path):
    fettle.compress(tiny_llama, tmp_path / "once", small_recipe, evaluate=False)
    with pytest.raises(UsageError, match="compressed already"):
        prepare(tmp_path / "once", small_recipe)


def test_sigterm_stops_within_seconds_and_the_run_resumes(tiny_llama, text_file, undisturbed, tmp_path):
    out = tmp_path / "model"
    run = killed_run(tiny_llama, out, text_file, 8, signal.SIGTERM)
    assert run.code not in (0, -signal.SIGTERM)
    assert "InterruptedRunError: stopped by SIGTERM" in run.said
    fettle.compress(tiny_llama, out, make_recipe(text_file), evaluate=False)
    assert digests(out) == undisturbed[0]


def test_embedding_and_head_are_compressed_by_name_and_tied_once(tiny_llama, text_file, tmp_path):
    steps = [{"method": "round_to_nearest", "bits": 8, "where": {"role": ["embedding"]}}]
    recipe = parse_recipe({"steps": steps}, "t")
    fettle.compress(tiny_llama, tmp_path / "out", recipe, evaluate=False)
    loaded = fettle.load(tmp_path / "out")
    ids = torch.arange(20).unsqueeze(0)
    original = fettle.load(tiny_llama).model(ids).logits
    close = loaded.model(ids).logits
    assert not torch.equal(original, close)
    assert torch.nn.functional.cosine_similarity(original.flatten(), close.flatten(), dim=0) > 0.999


def test_the_base_is_never_written_to(tiny_llama, small_recipe):
    before = digests(tiny_llama)
    for output in (tiny_llama, tiny_llama / "inside", tiny_llama / "deep" / "inside"):
        with pytest.raises(UsageError, match="model's own folder"):
            fettle.compress(tiny_llama, output, small_recipe, evaluate=False)
    assert digests(tiny_llama) == before


def test_a_base_that_lies_where_the_run_folder_would_is_refused(tiny_llama, small_recipe, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "m.run")
    before = digests(tmp_path / "m.run")
    with pytest.raises(UsageError, match="model's own folder"):
        fettle.compress(tmp_path / "m.run", tmp_path / "m", small_recipe, evaluate=False)
    assert digests(tmp_path / "m.run") == before


def test_a_finished_run_still_does_what_is_asked_of_it_later(tiny_llama, tmp_path):
    out, page = tmp_path / "out", tmp_path / "deep" / "page.html"
    first = fettle.compress(tiny_llama, out, PLAIN, evaluate=False)
    assert first.evaluation is None and first.summary["completions"] == []
    again = fettle.compress(tiny_llama, out, PLAIN, evaluate=True, report=page, prompt="def fox")
    assert again.resumed_whole and again.evaluation is not None and page.is_file()
    assert [pair["prompt"] for pair in again.summary["completions"]] == ["def fox"]
    assert "KL to the original" in (out / "README.md").read_text()
    assert json.loads((out / "fettle.json").read_text())["results"]["kl_mean"] == again.evaluation.kl_mean
    Checkpoint.open(out).verify_hashes()
    assert fettle.compress(tiny_llama, out, PLAIN, evaluate=False).evaluation == again.evaluation


def test_what_generic_wrote_loads_without_being_told(tiny_llama, tmp_path):
    out = tmp_path / "out"
    fettle.compress(tiny_llama, out, PLAIN, generic=True, evaluate=False)
    loaded = fettle.load(out)
    assert loaded.anatomy.family == "generic"
    assert fettle.generate(loaded, "def fox", max_new_tokens=2) is not None


def test_a_mask_of_minus_infinity_refuses_nothing(tmp_path):
    from safetensors.torch import load_file, save_file

    write_model("gpt2", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    masks = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-torch.inf).half() for i in range(3)}
    save_file(load_file(path) | masks, path, metadata={"format": "pt"})
    fettle.compress(tmp_path / "base", tmp_path / "out", PLAIN, evaluate=False)
    kept = Checkpoint.open(tmp_path / "out").read("transformer.h.0.attn.masked_bias")
    assert torch.isinf(kept).all()


def test_the_context_of_a_gpt2_is_known_by_its_own_name(tiny_llama, text_file, tmp_path):
    base = tmp_path / "base"
    with_tokenizer("gpt2", tiny_llama, base)
    with pytest.raises(UsageError, match="calibration length=65; this model's context holds 64"):
        calibration = {"windows": 2, "length": 65, "text": str(text_file)}
        recipe = parse_recipe({"steps": [{"method": "gptq"}], "calibration": calibration}, "t")
        fettle.compress(base, tmp_path / "gptq", recipe, evaluate=False)
    with pytest.raises(UsageError, match="length=65; this model's context holds 64"):
        fettle.evaluate(base, text=text_file, length=65)
    made = fettle.compress(base, tmp_path / "out", PLAIN, evaluate=True)
    assert made.evaluation is not None and made.evaluation.window_tokens == 64


def test_the_card_of_an_encoder_names_a_class_that_loads_it(tmp_path):
    write_model("bert", tmp_path / "base")
    recipe = parse_recipe({"steps": [{"method": "round_to_nearest", "group_size": 4}]}, "test")
    fettle.compress(tmp_path / "base", tmp_path / "out", recipe, evaluate=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModel.from_pretrained" in card and "AutoModelForCausalLM" not in card


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"evaluate": True}, r"base has no tokenizer files.*--no-evaluate"),
        ({"prompt": "def fox"}, r"base has no tokenizer files"),
        ({"report": "."}, r"the page \. cannot be written"),
    ],
)
def test_what_would_fail_after_the_work_is_refused_before_it(tmp_path, asked, told):
    write_model("llama", tmp_path / "base")
    with pytest.raises(UsageError, match=told):
        fettle.compress(tmp_path / "base", tmp_path / "out", PLAIN, **asked)
    assert not (tmp_path / "out").exists() and not run_folder(tmp_path / "out").exists()
    assert fettle.compress(tmp_path / "base", tmp_path / "out", PLAIN).evaluation is None


@pytest.mark.parametrize(
    ("name", "changes", "asked", "told"),
    [
        ("llama", {"vocab_size": 40}, {"evaluate": True}, r"base cannot be measured: token id \d+ is outside"),
        ("llama", {"vocab_size": 40}, {"prompt": "def fox"}, r"token id \d+ is outside the embedding of 40 rows"),
        ("llama", {}, {"prompt": "fox " * 200}, r"the prompt has \d+ tokens; this model's context holds 64.*base"),
        ("llama", {}, {"prompt": "fox \udcff"}, "not UTF-8"),
        ("bert", {}, {"prompt": "def fox"}, "is an encoder"),
    ],
)
def test_a_base_that_cannot_be_measured_or_asked_is_named_before_the_work(
    tiny_llama, tmp_path, name, changes, asked, told
):
    with_tokenizer(name, tiny_llama, tmp_path / "base", **changes)
    with pytest.raises(UsageError, match=told):
        fettle.compress(tmp_path / "base", tmp_path / "out", PLAIN, **({"evaluate": False} | asked))
    assert not (tmp_path / "out").exists()


def with_tokenizer(name, source, folder, **changes):
    """The tiny model `name`, as wide a vocabulary as the tokenizer of `source`, and that tokenizer."""
    import transformers

    class_name, fields = TINY[name]
    settings = {**fields, "vocab_size": 320, **changes}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    getattr(transformers, class_name)(config).save_pretrained(folder)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)


def test_products_that_nobody_sees_are_refused_not_guessed(tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x @ self.weight.T)
    with pytest.raises(ModelError, match="no product with the weights"):
        fettle.compress(tiny_llama, tmp_path / "out", make_recipe(text_file), generic=True, evaluate=False)


def test_calibration_that_cannot_be_is_refused_before_any_work(tiny_llama, text_file, tmp_path):
    recipe = make_recipe(text_file).to_dict()
    for changes, told in (({"length": 100_000}, "context holds"), ({"windows": 10**9}, "allowed are")):
        wrong = parse_recipe(recipe | {"calibration": recipe["calibration"] | changes}, "test")
        with pytest.raises(UsageError, match=told):
            fettle.compress(tiny_llama, tmp_path / "out", wrong, evaluate=False)
    assert not (tmp_path / "out").exists()


def test_a_run_that_wrote_nothing_does_not_bind_the_next(tiny_llama, text_file, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=4000))
    with pytest.raises(DiskFullError):
        fettle.compress(tiny_llama, tmp_path / "out", make_recipe(text_file), evaluate=False)
    monkeypatch.undo()
    fettle.compress(tiny_llama, tmp_path / "out", make_recipe(text_file, bits=3), evaluate=False)
    assert json.loads((tmp_path / "out" / "fettle.json").read_text())["recipe"]["steps"][0]["bits"] == 3
