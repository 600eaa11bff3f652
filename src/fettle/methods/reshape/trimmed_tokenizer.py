"""A byte-pair tokenizer with fewer tokens that cuts the same text into the same tokens.

Byte-pair encoding merges, in every word, the pair of least rank until there is none (Sennrich et al. 2016,
https://arxiv.org/abs/1508.07909). The merges that make a token do not depend on what stands beside it, or it would not
be a token of the word in the end. So it is enough to keep, for each token in use, the tokens that its own merges pass
through, and every merge whose two parts and whose product are kept: on the text in use the same pair has the least rank
at each step, as all pairs that ever had it are still there.

Files that name tokens by number are rewritten together: tokenizer.json (vocabulary, merges, added tokens,
post-processor), tokenizer_config.json, generation_config.json, special_tokens_map.json needs none.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fettle.errors import RecipeError

TRIMMED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def kept_tokens(tokenizer: Mapping[str, Any], used: Collection[int], rows: int) -> list[int]:
    """The ids that stay, ascending: those in use, added ones, the alphabet, and what their merges pass through.

    Raises:
        RecipeError: not a byte-pair tokenizer.
    """
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise RecipeError(
            f"trim_vocabulary: the tokenizer is a {model.get('type')}, and only byte-pair tokenizers (BPE) are "
            "trimmed; leave the step out"
        )
    ids: dict[str, int] = model["vocab"]
    ranks = {pair: rank for rank, pair in enumerate(_pairs(model["merges"]))}
    added = {int(token["id"]) for token in tokenizer.get("added_tokens", ())}
    alphabet = {number for token, number in ids.items() if len(token) == 1 or _is_byte(token)}
    wanted = added | alphabet | {number for number in used if number < rows}
    named = {token for token, number in ids.items() if number in wanted}
    for token in sorted(named):
        wanted |= {ids[part] for part in _passed_through(token, ranks) if part in ids}
    if model.get("unk_token") in ids:
        wanted.add(ids[model["unk_token"]])
    return sorted(number for number in wanted if number < rows)


def trim_files(files: Mapping[str, Mapping[str, Any]], new: Mapping[int, int]) -> dict[str, str]:
    """The same files as text, with old ids → new ones, and without what is gone."""
    found = {}
    for name, content in files.items():
        table = copy.deepcopy(dict(content))
        if name == "tokenizer.json":
            _trim_tokenizer(table, new)
        elif name == "tokenizer_config.json":
            decoder = table.get("added_tokens_decoder")
            if isinstance(decoder, dict):
                table["added_tokens_decoder"] = {str(new[int(k)]): v for k, v in decoder.items() if int(k) in new}
        else:
            table = renumbered(table, new)
        found[name] = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    return found


def renumbered(table: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A configuration whose token ids are the new ones; ids that are gone are left out of lists, and become null."""
    found = dict(table)
    for key, value in table.items():
        if not key.endswith(("_token_id", "_token_ids", "suppress_tokens")):
            continue
        if isinstance(value, list):
            found[key] = [new[one] for one in value if one in new]
        elif isinstance(value, int):
            found[key] = new.get(value)
    return found


def _trim_tokenizer(table: dict[str, Any], new: Mapping[int, int]) -> None:
    model = table["model"]
    vocabulary = {token: new[number] for token, number in model["vocab"].items() if number in new}
    model["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    model["merges"] = [list(pair) for pair in _pairs(model["merges"]) if {*pair, "".join(pair)} <= vocabulary.keys()]
    table["added_tokens"] = [
        {**token, "id": new[token["id"]]} for token in table.get("added_tokens", ()) if token["id"] in new
    ]
    _renumber_processor(table.get("post_processor"), new)


def _renumber_processor(processor: Any, new: Mapping[int, int]) -> None:
    """Special tokens that are put around a text: in templates, in BERT's and RoBERTa's pairs, in sequences of these."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors", ()):
        _renumber_processor(part, new)
    for special in (processor.get("special_tokens") or {}).values():
        if isinstance(special, dict) and "ids" in special:
            special["ids"] = [new[number] for number in special["ids"]]
    for key in ("sep", "cls"):
        pair = processor.get(key)
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int):
            processor[key] = [pair[0], new[pair[1]]]


def _pairs(merges: Iterable[Any]) -> Iterable[tuple[str, str]]:
    """Merges as pairs: older files write them as one word with a space between."""
    for merge in merges:
        first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield first, second


def _is_byte(token: str) -> bool:
    """Whether this is how a byte without a token of its own is written: <0x0A>."""
    return len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")


def _passed_through(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Everything that the merges of a token make on the way to it."""
    parts, found = list(token), set(token)
    while len(parts) > 1:
        places = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not places:
            break
        _, place = min(places)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        found.add(parts[place])
    return found
