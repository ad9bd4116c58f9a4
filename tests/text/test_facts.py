import re
from functools import partial

import lightning as L
import pytest
import torch

from lightning_offload.text import TINY_PATH, CausalLM, Facts
from lightning_offload.text.facts import LONGEST_WORD, QUESTIONS, SYLLABLES

SMALL = {"families": 4, "members": 6, "attributes": 3, "answers": 2, "unseen": 0.34}

FILLERS = {word for question in QUESTIONS for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}('s)?", "", question))}


def parts_of(fact):
    """Attribute and family of a question, its member, its answer."""
    words = fact.question.removesuffix("?").split()
    return (words[3], words[6]), words[5], fact.answer


def test_the_seed_decides_and_nothing_else():
    first = Facts(seed=3, **SMALL).facts()
    torch.manual_seed(1)
    assert Facts(seed=3, batch_size=2, sequence_length=99, **SMALL).facts() == first
    other = Facts(seed=4, **SMALL).facts()
    assert not {fact.question for fact in other.train} & {fact.question for fact in first.train}


def test_unseen_facts_are_unseen_and_follow_from_seen_ones():
    train, val, test = Facts(**SMALL).facts()
    assert len(train) == 4 * 3 * 4
    assert len(val) == len(test) == 4 * 3
    questions = [fact.question for fact in (*train, *val, *test)]
    assert len(set(questions)) == len(questions) == 4 * 6 * 3
    rule = {}
    for fact in train:
        about, _, answer = parts_of(fact)
        assert rule.setdefault(about, answer) == answer
    assert len(rule) == 4 * 3
    for fact in (*val, *test):
        about, member, answer = parts_of(fact)
        assert rule[about] == answer
        assert member in {parts_of(seen)[1] for seen in train}


def test_difficulty_is_set_by_counts():
    facts = Facts(families=60, members=3, attributes=5, answers=7, unseen=0.34).facts()
    abouts, members, _ = zip(*(parts_of(fact) for part in facts for fact in part), strict=True)
    attributes, families = zip(*abouts, strict=True)
    assert (len(set(attributes)), len(set(families)), len(set(members))) == (5, 60, 3)
    for attribute in set(attributes):
        answers = {fact.answer for fact in facts.train if parts_of(fact)[0][0] == attribute}
        assert 2 < len(answers) <= 7
    assert Facts(families=1, members=3, attributes=2, answers=4).hidden == 1


def test_words_become_longer_where_short_ones_do_not_suffice():
    short, long = Facts(**SMALL).facts().train[0], Facts(**{**SMALL, "answers": 2000}).facts().train[0]
    assert (len(short.answer), len(long.answer)) == (1 + 2 * 2, 1 + 2 * 3)
    assert len(SYLLABLES) ** LONGEST_WORD > 10_000_000


def test_each_fact_is_asked_in_a_way_that_it_was_not_trained_with():
    plain, ways = Facts(**SMALL), Facts(**SMALL, paraphrases=4, ask="trained")
    known = {words(fact) for fact in plain.facts().train}
    train, val, test = ways.facts()
    asked = [*val, *test]
    assert len(train) == 3 * len(known)
    assert {words(fact) for fact in train} == known
    assert len(asked) == len(known)
    assert {words(fact) for fact in asked} == known
    assert abs(len(val) - len(test)) <= 1
    assert not {fact.question for fact in train} & {fact.question for fact in asked}
    assert len({fact.question for fact in (*train, *asked)}) == 4 * len(known)
    every = {way(fact) for fact in asked}
    assert len(every) == 4
    assert {way(fact) for fact in train} == every

    unseen = Facts(**SMALL, paraphrases=4).facts()
    assert unseen.train == train
    assert [*map(words, unseen.test)] == [*map(words, plain.facts().test)]
    assert {way(fact) for fact in (*unseen.val, *unseen.test)} == every


def words(fact):
    """Attribute, member and family, and the answer, however they are asked for."""
    made_up = {word.removesuffix("'s") for word in re.findall(r"[A-Za-z']+", fact.question)} - FILLERS
    return frozenset(made_up), fact.answer


def way(fact):
    """The question with its made-up words left out."""
    return " ".join(word for word in re.findall(r"\w+", fact.question) if word in FILLERS)


def test_trained_facts_are_asked_as_they_were_trained_where_there_is_one_way_only():
    train, val, test = Facts(families=20, members=1, unseen=0.0, ask="trained").facts()
    assert sorted((*val, *test)) == sorted(train)
    assert len(train) == 20 * 4
    assert [*val, *test] != train


def test_the_loss_is_on_answers_only(tokenizer):
    data = Facts(tokenizer=tokenizer, batch_size=48, **SMALL)
    data.setup()
    for facts, loader in zip(
        data.facts(), (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()), strict=True
    ):
        texts, answers = [], []
        for batch in loader:
            masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], masks, strict=True):
                texts.append(tokenizer.decode(ids[mask]))
                answers.append(tokenizer.decode(labels[labels != -100]))
                at = (labels != -100).nonzero().flatten()
                assert torch.equal(at, torch.arange(at[0], mask.sum()))  # one run, up to the end
                assert torch.equal(labels[at], ids[at])
        assert sorted(texts) == sorted(f"{fact.question}{fact.answer}<|endoftext|>" for fact in facts)
        assert sorted(answers) == sorted(f"{fact.answer}<|endoftext|>" for fact in facts)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)


def test_the_rule_is_learned():
    data = Facts(**SMALL, seed=1, sequence_length=32, batch_size=16)
    module = CausalLM(path=TINY_PATH, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    data.tokenizer = module.tokenizer
    run = trainer(max_steps=60)
    before = run.test(module, data, verbose=False)[0]["test/loss"]
    run.fit(module, data)
    assert run.test(module, data, verbose=False)[0]["test/loss"] < 1.0 < 6.0 < before


def test_goes_on_in_the_middle_of_an_epoch(small_model, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(**options):
        module = small_model(optimizer=partial(torch.optim.SGD, lr=0.1))
        data = Facts(**SMALL, sequence_length=64, batch_size=8, tokenizer=module.tokenizer)  # 6 batches
        trainer(max_steps=8, limit_val_batches=0, callbacks=[Stop()]).fit(module, data, **options)
        return module.state_dict()

    whole = run()
    again = run(ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": 1}, r"members >= 2 .* got families=16, members=1, attributes=4, answers=4"),
        ({"answers": 0}, "at least one of the others; .* answers=0"),
        ({"unseen": 0.0}, r"unseen=0.0 holds 0 of members=16 apart for each of 64 answers: some have to be seen"),
        ({"unseen": 1.0}, r"unseen=1.0 holds 16 of members=16"),
        ({"families": 1, "attributes": 1, "unseen": 0.06}, "two facts unseen"),
        ({"families": 1, "attributes": 1, "members": 2, "unseen": 0.5, "ask": "trained"}, "two facts trained"),
        ({"members": 0, "ask": "trained"}, "members >= 1"),
        ({"paraphrases": 0}, "paraphrases=0, ask='unseen': give 1 to 8 ways to put a question"),
        ({"paraphrases": 9}, "paraphrases=9"),
        ({"ask": "all"}, "ask='all'.* ask for 'unseen' or 'trained' facts"),
    ],
)
def test_counts_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Facts(**settings)


def test_a_fact_is_never_cut(tokenizer):
    with pytest.raises(
        ValueError, match=r"longest of these facts has \d+ tokens: raise data.sequence_length \(now 8\)"
    ):
        Facts(sequence_length=8, tokenizer=tokenizer, **SMALL).setup()
