"""Answers that a model gives by itself, greedily, and whether they are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_offload.errors import DataError
from lightning_offload.text.loss import IGNORED

Match = Literal["exact", "contains"]


class Asked(NamedTuple):
    """Token ids of each example, (tokens,): its prompt, and the answer after it."""

    prompts: list[Tensor]
    answers: list[Tensor]


def asked(batch: dict[str, Tensor]) -> Asked:
    """Prompts and answers of a batch, whichever side is padded.

    Raises:
        DataError: for an example that is not one prompt with what is learned after it.
    """
    prompts, answers = [], []
    masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for row, labels, mask in zip(batch["input_ids"], batch["labels"], masks, strict=True):
        ids, learned = row[mask], labels[mask] != IGNORED
        start = len(ids) - int(learned.sum())
        if not 0 < start < len(ids) or not bool(learned[start:].all()):
            raise DataError(
                "match_answers takes examples of one prompt and one answer (facts, gsm8k, jsonl with prompt and"
                f" completion); in this one {len(ids) - start} of {len(ids)} tokens are learned. Leave it out."
            )
        prompts.append(ids[:start])
        answers.append(ids[start:])
    return Asked(prompts, answers)


@torch.no_grad()
def continued(
    network: Any, prompts: Sequence[Tensor], *, tokenizer: Any, max_new_tokens: int, end: str | None
) -> list[str]:
    """What follows each prompt, greedily, all in one batch padded on the left.

    Args:
        network: a causal language model of transformers; its own settings of generation do not count.
        prompts: token ids, (tokens,) each, on the device of the computation.
        tokenizer: of the network.
        max_new_tokens: at most so many.
        end: text that ends an answer and does not belong to it, beside the end-of-text token; None for that alone.
    """
    from transformers import StoppingCriteriaList

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = pad_sequence(list(prompts), batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")

    def ended(tokens: Tensor, scores: Tensor, **_: Any) -> Tensor:
        last = tokenizer.batch_decode(tokens[:, -1:].tolist())
        return torch.tensor([end in text for text in last], device=tokens.device)

    output = network.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([ended] if end else []),
    )
    texts = _texts(tokenizer, output[:, ids.shape[1] :].tolist())
    return [text.partition(end)[0] for text in texts] if end else texts


def right_answers(
    network: Any, batch: dict[str, Tensor], *, tokenizer: Any, data: Any, match: Match, max_new_tokens: int
) -> Tensor:
    """Which prompts of a batch `network` answers right.

    Args:
        network: see `continued`.
        batch: ``input_ids``, ``labels`` and maybe ``attention_mask``, (n, s).
        tokenizer: see `continued`.
        data: says what ends an answer and what of it counts (see `TextData`), where it is one of this package.
        match: ``"exact"``: the answer is the right one; ``"contains"``: the right one occurs in it, which the paper of
            MEFT (arXiv 2406.04984) calls exact match.
        max_new_tokens: see `continued`.

    Returns:
        (n,), fp32, 1 where right.

    Raises:
        DataError: for a batch without prompts and answers, or an answer of the data with nothing that counts.
    """
    prompts, answers = asked(batch)
    counts: Callable[[str], str] = getattr(data, "final_answer", str.strip)
    said = continued(
        network, prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens, end=getattr(data, "answer_end", None)
    )
    right = []
    for text, whole in zip(said, _texts(tokenizer, [answer.tolist() for answer in answers]), strict=True):
        given, gold = counts(text), counts(whole)
        if not gold:
            raise DataError(f"Nothing counts in the answer {whole[-80:]!r}: if it is cut, raise data.sequence_length.")
        right.append(given == gold if match == "exact" else gold in given)
    return torch.tensor(right, dtype=torch.float32, device=batch["input_ids"].device)


def _texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts
