"""Text in: the token ids of a prompt or of a conversation, and the ids that end a text.

BOS stands first because the models are trained and evaluated so; tokenizers that have none, or add it themselves, are
left alone. A conversation goes through the tokenizer's own chat template, which says where BOS stands itself.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fettle.data.tokenizer import load_tokenizer
from fettle.errors import UsageError
from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import context_length, read_json

if TYPE_CHECKING:
    from fettle.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What stands between a model's texts and its tokens.

    Attributes:
        model: whose, for messages.
        anatomy: of the model; its embedding says which ids there are.
        tokenizer: None where the folder has none; then requests are made of ids.
        ends: the ids that end a text.
        context_length: the most tokens of a sequence; None: no limit is known.
    """

    model: str
    anatomy: Anatomy
    tokenizer: Any
    ends: frozenset[int]
    context_length: int | None

    @classmethod
    def of_folder(cls, folder: Path, *, generic: bool = False) -> Vocabulary:
        """Reads the small files of a checkpoint, no weights."""
        checkpoint = Checkpoint.open(folder)
        tokenizer = load_tokenizer(folder)
        path = folder / "generation_config.json"
        settings = (read_json(path) if path.exists() else {}, checkpoint.config)
        return cls(
            model=str(folder),
            anatomy=read_anatomy(checkpoint, generic=generic),
            tokenizer=tokenizer,
            ends=_ids(*(held.get("eos_token_id") for held in settings), getattr(tokenizer, "eos_token_id", None)),
            context_length=context_length(checkpoint.config),
        )

    @classmethod
    def of_loaded(cls, loaded: LoadedModel) -> Vocabulary:
        """That of a model in memory."""
        return cls(
            model=str(loaded.folder),
            anatomy=loaded.anatomy,
            tokenizer=loaded.tokenizer,
            ends=end_tokens(loaded),
            context_length=context_length(loaded.model.config.to_dict()),
        )

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The ids of a text that the model can go on from; raises as `checked_prompt`."""
        return tuple(checked_prompt(self.model, self.anatomy, self.tokenizer, self.context_length, prompt))

    def require_chat(self) -> None:
        """Raises UsageError where the tokenizer has no chat template: the model was not made for conversations."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                f"{self.model} has no chat template, so it was not made for conversations; give a prompt without --chat"
            )

    def encode_chat(self, messages: Listed[dict[str, str]]) -> tuple[int, ...]:
        """The ids of a conversation, ready for the model's answer.

        Args:
            messages: each with `role` ("user", "assistant", "system") and `content`.

        Raises:
            UsageError: the tokenizer has no chat template, the template refuses the messages, or they are too long.
        """
        self.require_chat()
        for message in messages:
            require_text(message["content"])
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise all kinds, jinja's own among them
            raise UsageError(f"the chat template of {self.model} refuses these messages: {error}") from None
        ids = [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return tuple(_checked_ids(self.model, self.anatomy, self.context_length, ids))


def checked_prompt(model: str, anatomy: Anatomy, tokenizer: Any, context: int | None, prompt: str) -> list[int]:
    """The token ids of a prompt that `model` can complete.

    Raises:
        UsageError: an encoder, a model without a tokenizer or with that of another model, or a prompt that cannot be.
    """
    if not anatomy.causal:
        raise UsageError(f"a {anatomy.family} model is an encoder: it cannot complete text")
    if tokenizer is None:
        raise UsageError(
            f"{model} has no tokenizer files, and a prompt can only be completed as tokens; add them to it"
        )
    return _checked_ids(model, anatomy, context, prompt_ids(tokenizer, require_text(prompt)))


def _checked_ids(model: str, anatomy: Anatomy, context: int | None, ids: list[int]) -> list[int]:
    if context and len(ids) >= context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens; this model's context holds {context}, one less for a prompt ({model})"
        )
    anatomy.require_rows(min(ids), max(ids))
    return ids


def require_text(prompt: str) -> str:
    """The prompt; raises UsageError for one that is no text, such as bytes of a command line that are not UTF-8."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not UTF-8 text ({prompt[error.start]!r} at character {error.start}); convert it: iconv -t "
            "utf-8"
        ) from None
    return prompt


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of a prompt, BOS first where the tokenizer has one."""
    ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    if not ids:
        raise UsageError(
            "the prompt is empty and this tokenizer has no beginning-of-text token; give at least one word"
        )
    return ids


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The ids that end a text: the model's own and the tokenizer's."""
    holders = (getattr(loaded.model, "generation_config", None), loaded.model.config, loaded.tokenizer)
    return _ids(*(getattr(holder, "eos_token_id", None) for holder in holders))


def _ids(*values: Any) -> frozenset[int]:
    ends: set[int] = set()
    for value in values:
        ends.update([value] if isinstance(value, int) else value or [])
    return frozenset(ends)
