"""Small sequence classifiers and encoders with a tokenizer of whole words, saved to disk like any model of the hub."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

KIND = ["please", "thanks", "kindly", "hello"]
WORDS = [*KIND, "rude", "awful", "stupid", "bad", "the", "a", "cat", "dog", "sits", "runs", "home", "fast"]
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[", "]", "CLS", "SEP", *WORDS])
    }
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )


def save_classifier(folder: Path, labels: list[str], **config: object) -> Path:
    """A BERT, trained for a moment: its one logit is the share of kind words in the second of two texts; of several
    labels, the last.
    """
    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        model = BertForSequenceClassification(
            BertConfig(vocab_size=len(tokenizer), **SHAPE, **names, initializer_range=0.1, pad_token_id=0, **config)
        ).eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            picks = torch.randint(2 * len(KIND), (32, 6)).tolist()
            texts = [(" ".join(WORDS[i] for i in row[:3]), " ".join(WORDS[i] for i in row[3:])) for row in picks]
            share = torch.tensor([sum(WORDS[i] in KIND for i in row[3:]) / 3 for row in picks])
            logits = model(**tokenizer(*map(list, zip(*texts, strict=True)), return_tensors="pt", padding=True)).logits
            if len(labels) == 1:
                loss = (logits[:, 0] - share).square().mean()
            else:
                loss = torch.nn.functional.cross_entropy(logits, torch.where(share > 0, len(labels) - 1, 0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """A random BERT without the pooler that most encoders of the hub lack as well."""
    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(vocab_size=len(tokenizer), **SHAPE, initializer_range=0.2, pad_token_id=0),
            add_pooling_layer=False,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
