"""EmbeddingSimilarity, with a real encoder saved to disk."""

import math

import pytest
import torch
from text_models import SHAPE, save_encoder, word_tokenizer
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.rewards import EmbeddingSimilarity, Scorer, failure_counts
from stateset_lightning.types import Turn


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def similarity(folder, answers, targets, **options):
    conversations = [[Turn("user", "q"), Turn("assistant", answer)] for answer in answers]
    return EmbeddingSimilarity(str(folder), **options).compute_rewards(
        conversations, [{"id": "s1", "target": t} for t in targets]
    )


def embedded(folder, text):
    """By hand: the mean of the last hidden states, without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_it_is_the_cosine_of_mean_embeddings(encoder, batch_size):
    answers, targets = (
        ["the cat", "dog", "the cat sits", "hello rude"],
        [
            "the dog runs home fast",
            "cat",
            "the cat sits",
            "a",
        ],
    )
    expected = [
        float(torch.cosine_similarity(embedded(encoder, a), embedded(encoder, t), dim=0))
        for a, t in zip(answers, targets, strict=True)
    ]
    assert similarity(encoder, answers, targets, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)
    assert expected[2] == pytest.approx(1.0)
    assert min(expected) < 0.9


def test_a_prefix_stands_before_both(encoder):
    (score,) = similarity(encoder, ["dog"], ["cat"], prefix="please ")
    expected = torch.cosine_similarity(embedded(encoder, "please dog"), embedded(encoder, "please cat"), dim=0)
    assert score == pytest.approx(float(expected), abs=1e-5)


def test_the_best_of_several_targets_counts(encoder):
    assert similarity(encoder, ["dog"], [["cat", "dog", "a"]]) == [pytest.approx(1.0)]
    assert similarity(encoder, ["dog"], ["dog"])[0] <= 1.0


def test_a_broken_embedding_fails_and_is_not_the_best_score(encoder, monkeypatch):
    vectors = {"dog": torch.tensor([1.0, 0.0]), "cat": torch.tensor([math.nan, 0.0]), "a": torch.tensor([0.0, 1.0])}
    monkeypatch.setattr(EmbeddingSimilarity, "_embeddings", lambda self, texts: vectors)
    scores = similarity(encoder, ["dog", "cat", "dog", "a"], ["dog", "dog", ["dog", "cat"], "dog"])
    assert scores[0] == 1.0
    assert math.isnan(scores[1])
    assert math.isnan(scores[2])
    assert scores[3] == 0.0


def test_no_text_scores_0_and_a_missing_target_fails_alone(encoder):
    scores = similarity(encoder, ["", " \n", "dog", "dog", "dog", "cat " * 30], ["dog", "dog", None, "", "dog", "dog"])
    assert scores[:2] == [0.0, 0.0]
    assert [isinstance(score, DataError) for score in scores] == [False, False, True, True, False, True]
    assert "target=[''] of scenario 's1' is empty" in str(scores[3])


def test_positions_behind_the_padding_are_not_for_text(tmp_path):
    """RoBERTa numbers its positions from the padding's on: of 24, one is no token's."""
    tokenizer = word_tokenizer()
    config = RobertaConfig(vocab_size=len(tokenizer), **SHAPE, pad_token_id=0)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # [CLS] and [SEP] stand around
    fits, too_long = similarity(tmp_path, [" ".join(["dog"] * count) for count in (21, 22)], ["cat", "cat"])
    assert math.isfinite(fits)
    assert isinstance(too_long, DataError)
    assert "reads texts of 1 to 23 tokens; this one has 24" in str(too_long)


def test_it_scores_an_episode(encoder):
    with Scorer(EmbeddingSimilarity(str(encoder))) as scorer:
        session = scorer.start(3)
        for n, answer in enumerate(["dog", "cat", "dog"]):
            session.submit(n, [Turn("user", "q"), Turn("assistant", answer)], {"target": "dog"})
        scores = session.collect()
    first, second, third = scores.totals_N.tolist()
    assert first == third == pytest.approx(1.0)
    assert second < first
    assert failure_counts(scores) == {}


def test_an_encoder_that_lacks_weights_is_refused(tmp_path, encoder):
    model = AutoModel.from_pretrained(encoder)
    state = {name: value for name, value in model.state_dict().items() if "attention.self.query" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"embedding_similarity.model_name=.* has no weights for .*query"):
        similarity(tmp_path, ["dog"], ["dog"])
