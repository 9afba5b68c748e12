"""What transformers 5 makes of an export: our logits, our summaries, our token ids."""

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hf_models import (
    LOSSLESS,
    MODEL,
    MODELS,
    WORDS,
    copy_with,
    draw_inputs,
    draw_parameters,
    import_hf,
    load_parameters,
    our_logits,
)
from numpy_t5 import forward

from growth.choices import Choices
from launch.recipes.grow_hugging_face import grow_hugging_face
from t5pegasus.config import ModelConfig
from t5pegasus.convert.hf import export_hf, fold_scale
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.convert.imported import Imported, save_imported
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate
from t5pegasus.sample import TRAIN_PATH
from t5pegasus.text.read import read_documents
from t5pegasus.text.tokenizer import Tokenizer, adopt_vocabulary
from t5pegasus.text.tokenizer.sentencepiece import SentencepieceTokenizer
from t5pegasus.text.tokenizer.training import train_sentencepiece
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

pytestmark = pytest.mark.peers

EDGE_TEXTS = [
    "", " ", "今天天气不错，适合出门散步。", "T5 PEGASUS的分词器，Café 2021年！", "全国人民代表大会常务委员会\n第３次",
    "魑魅魍魉internationalization😀ok", "a  b   c ", " 前面有空格", "行\n\n行\t制表",
    "</s><pad><unk>[MASK] [SEP]<0x0A>", "▁下划线▁", "ＡＢＣ，ｱ①㍿ﬁ", "x" * 300,
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Nothing is fetched, and code that comes with a tokenizer is cached here."""
    pytest.importorskip("torch")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("huggingface"))}
    pytest.importorskip("transformers").utils.logging.set_verbosity_error()


def load_model(folder: Path):
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def their_logits(folder: Path, source, mask, decoder_input) -> np.ndarray:
    import torch

    source, mask, decoder_input = map(torch.tensor, (source, mask, decoder_input))
    with torch.no_grad():
        output = load_model(folder)(input_ids=source, attention_mask=mask, decoder_input_ids=decoder_input)
    return output.logits.numpy()


@pytest.mark.parametrize("name", LOSSLESS)
def test_logits_are_equal(checkpoints, exported, name: str):
    inputs = draw_inputs(MODEL.vocab_size)
    ours = our_logits(MODELS[name], load_parameters(checkpoints[name]), *inputs)
    np.testing.assert_allclose(their_logits(exported[name], *inputs), ours, rtol=0, atol=1e-5)


def test_a_lossy_export_computes_what_its_card_says(checkpoints, exported):
    inputs = draw_inputs(MODEL.vocab_size)
    config = fold_scale(MODELS["bert4keras"])
    parameters = load_parameters(checkpoints["bert4keras"])
    parameters["lm_head"] = parameters["lm_head"] * np.float32(config.d_model**-0.5)
    ours = our_logits(config, parameters, *inputs)
    np.testing.assert_allclose(their_logits(exported["bert4keras"], *inputs), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["hf-mt5", "t5-1.0", "tied, not scaled", "untied relu"])
def test_a_folder_that_was_grown_gives_their_logits_of_before(exported, tmp_path: Path, name: str):
    inputs = draw_inputs(MODEL.vocab_size)
    sizes = {"d_model": 19, "d_ff": 33, "num_heads": 8, "d_kv": 5, "num_encoder_layers": 4, "num_decoder_layers": 3}
    _, grown = grow_hugging_face(
        exported[name], tmp_path / "grown", lambda model: (dataclasses.replace(model, **sizes), Choices()),
        receipt="arrays",
    )  # fmt: skip
    before, after = (their_logits(folder, *inputs) for folder in (exported[name], grown))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-mt5", "t5-1.0"])
def test_large_logits_differ_by_rounding_alone(tmp_path: Path, name: str):
    """Of logits beyond 10, float32 itself loses more than 1e-5: both are equally far from the exact value."""
    config = dataclasses.replace(
        MODELS[name], vocab_size=1000, d_model=128, d_kv=32, num_heads=4, d_ff=256, num_encoder_layers=4,
        num_decoder_layers=4, layer_norm_epsilon=1e-6,
    )  # fmt: skip
    parameters = draw_parameters(config)
    head = "token_embedding" if config.tie_word_embeddings else "lm_head"
    parameters[head] *= np.float32(4 if name == "hf-mt5" else 2)
    tokenizer = WordpieceTokenizer([*WORDS[:4], *map(chr, range(0x4E00, 0x4E00 + 996))])
    checkpoint = save_imported(Imported(config, parameters, tokenizer), tmp_path / "checkpoint")
    inputs = draw_inputs(config.vocab_size)
    ours = our_logits(config, parameters, *inputs)
    theirs = their_logits(export_hf(checkpoint, tmp_path / "exported"), *inputs)
    tensors = parameters_to_hf(parameters, config)
    exact = np.stack([forward(tensors, config, *(array[row] for array in inputs)) for row in range(2)])
    largest = np.abs(exact).max()
    assert largest > 10
    rounding = 2e-6 * largest
    for computed in (ours, theirs):
        np.testing.assert_allclose(computed, exact, rtol=0, atol=rounding)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=rounding)


@pytest.mark.parametrize("name", ["hf-mt5", "t5-1.0", "folded"])
def test_summaries_are_equal(tmp_path: Path, name: str):
    """Greedy search and beams, by both of transformers' ways to end a beam search, in one model's life."""
    import torch

    config = MODELS[name]
    parameters = draw_parameters(config, seed=10 if config.tie_word_embeddings else 5)
    if config.tie_word_embeddings:  # an end that some outputs reach and some do not
        parameters["token_embedding"][[3, 13]] = parameters["token_embedding"][[13, 3]]
    checkpoint = save_imported(Imported(config, parameters, WordpieceTokenizer(WORDS)), tmp_path / "checkpoint")
    model = load_model(export_hf(checkpoint, tmp_path / "exported"))
    generator = np.random.default_rng(1)
    source = generator.integers(4, config.vocab_size, (12, 20)).astype(np.int32)
    mask = (np.arange(20)[None, :] < generator.integers(3, 21, (12, 1))).astype(np.int32)
    source = np.where(mask, source, config.pad_token_id)
    rows = np.arange(12, dtype=np.uint32)
    for num_beams, finalisation, early_stopping in (
        (1, "exact", False),
        (4, "exact", "never"),
        (4, "huggingface-never", "never"),
        (4, "huggingface", False),
    ):
        options = GenerationOptions(max_new_tokens=15, num_beams=num_beams, finalisation=finalisation)
        ours = generate(config, parameters, source, mask, rows, options).tokens[:, 0].tolist()
        theirs = model.generate(
            input_ids=torch.tensor(source), attention_mask=torch.tensor(mask), max_new_tokens=15,
            num_beams=num_beams, early_stopping=early_stopping,
        )[:, 1:].tolist()  # fmt: skip
        # Behind the end transformers writes pads, or ends where the pad id is 0 and beams were searched.
        ours, theirs = ([until_end(row, config.eos_token_id) for row in outputs] for outputs in (ours, theirs))
        assert ours == theirs, finalisation
        assert 0 < sum(row[-1] == config.eos_token_id for row in ours) < len(ours)


def until_end(row: list[int], end_id: int) -> list[int]:
    return row[: row.index(end_id) + 1] if end_id in row else row


def test_generation_config_is_what_generate_starts_from(exported):
    model = load_model(exported["hf-mt5"])
    settings = model.generation_config
    assert (settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id) == (2, 3, 0)
    assert settings.max_new_tokens == 128


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_transformers_saves_again_is_read(exported, checkpoints, tmp_path: Path, name: str):
    """Its configs say of every model that it is tied; the weights and a scale say what it is."""
    load_model(exported[name]).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "vocab.txt").write_bytes((exported[name] / "vocab.txt").read_bytes())
    imported = import_hf(tmp_path / "saved", tmp_path / "again")
    assert imported.model == MODELS[name]
    for key, array in load_parameters(checkpoints[name]).items():
        np.testing.assert_array_equal(imported.parameters[key], array)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hf-mt5", {"tie_word_embeddings": True}),
        ("hf-mt5", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}),
        ("hf-mt5", {"feed_forward_proj": "gated-gelu_pytorch_tanh", "dense_act_fn": None}),
        ("hf-mt5", {"model_type": "t5", "tie_word_embeddings": True}),
        ("hf-mt5", {"model_type": "t5", "tie_word_embeddings": False}),
        ("hf-mt5", {"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}),
        ("t5-1.0", {"model_type": "mt5", "transformers_version": "5.23.0", "scale_decoder_outputs": None}),
    ],
)
def test_a_config_means_what_transformers_computes(exported, tmp_path: Path, name: str, changes):
    def change(config, _):
        config |= changes
        for key in [key for key, value in changes.items() if value is None]:
            del config[key]
        config["architectures"] = [f"{config['model_type'].upper()}ForConditionalGeneration"]

    folder = copy_with(exported[name], tmp_path / "changed", change)
    imported = import_hf(folder, tmp_path / "imported")
    inputs = draw_inputs(MODEL.vocab_size)
    ours = our_logits(imported.model, imported.parameters, *inputs)
    np.testing.assert_allclose(their_logits(folder, *inputs), ours, rtol=0, atol=1e-5)


def export_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """An export with this tokenizer and a model of next to no size."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=2, d_kv=1, d_ff=2, num_heads=1, num_encoder_layers=1,
        num_decoder_layers=1, pad_token_id=tokenizer.pad_id, decoder_start_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
    )  # fmt: skip
    checkpoint = save_imported(Imported(config, draw_parameters(config), tokenizer), folder / "checkpoint")
    return export_hf(checkpoint, folder / "exported")


def check_tokenizer(tokenizer: Tokenizer, theirs, texts: list[str]) -> None:
    for text in texts:
        source = tokenizer.encode_source(text, 512)
        assert theirs(text, truncation=True).input_ids == source, text
        assert theirs(text_target=text, truncation=True).input_ids == tokenizer.encode_target(text, 512), text
        written = tokenizer.encode_target(text, 512)
        assert theirs.decode(written, skip_special_tokens=True) == tokenizer.decode(written), text
    assert theirs(texts, padding=True, truncation=True).input_ids[1][-1] == tokenizer.pad_id


@pytest.fixture(scope="module")
def sample_texts() -> list[str]:
    return EDGE_TEXTS + [document.text for document in read_documents([TRAIN_PATH])]


def test_sentencepiece_gives_our_ids(tmp_path: Path, sample_texts):
    from transformers import AutoTokenizer

    tokenizer = train_sentencepiece(read_documents([TRAIN_PATH]), 2500)
    check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(export_tokenizer(tokenizer, tmp_path)), sample_texts)


@pytest.mark.parametrize("dictionary", [True, False])
def test_wordpiece_gives_our_ids(tmp_path: Path, sample_texts, shared_data: Path, dictionary: bool):
    from transformers import AutoTokenizer

    name = "t5_pegasus_vocab_50000.txt" if dictionary else "bert_google_zh_vocab_21128.txt"
    tokenizer = adopt_vocabulary(shared_data / "vocab" / name, dictionary=dictionary)
    folder = export_tokenizer(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):  # without its code: no other ids, but a refusal
        AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    lines = (shared_data / "refs" / "tokenizer_golden.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    check_tokenizer(tokenizer, theirs, sample_texts + [json.loads(line)["text"] for line in lines])
    theirs.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    check_tokenizer(tokenizer, again, sample_texts[:20])


@pytest.mark.parametrize("name", ["uer_cluecorpussmall_spm.model", "seqio_test_sentencepiece.model"])
def test_published_sentencepiece_models_give_their_ids(tmp_path: Path, sample_texts, shared_data: Path, name: str):
    """NFKC, no byte pieces, one with pieces that its user defined; the other spells no literal special as we do."""
    from transformers import AutoTokenizer

    tokenizer = adopt_vocabulary(shared_data / "vocab" / name)
    texts = [text for text in sample_texts if "</s>" not in text or not name.startswith("seqio")]
    check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(export_tokenizer(tokenizer, tmp_path)), texts)


def test_specials_are_found_by_their_pieces(tmp_path: Path):
    """As in XLNet's models: pad and end are control symbols, and the trainer's options know no ids of them."""
    from transformers import AutoTokenizer

    texts = ["今天天气很好，我们去公园散步。", "人工智能的发展很快。"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20), model_writer=model, vocab_size=60, pad_id=-1, eos_id=-1, bos_id=-1,
        unk_id=0, control_symbols="<pad>,</s>", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = SentencepieceTokenizer(model.getvalue())
    assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.unk_id) == (1, 2, 0)
    check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(export_tokenizer(tokenizer, tmp_path)), texts)


def test_a_model_that_cannot_be_expressed_is_refused_by_auto_tokenizer(tmp_path: Path, shared_data: Path):
    """Byte-pair encoding: the card then says how to get ids, and nothing else gives other ones."""
    from transformers import AutoTokenizer

    folder = export_tokenizer(adopt_vocabulary(shared_data / "vocab" / "pegasus_sp_test.model"), tmp_path)
    assert "sentencepiece.SentencePieceProcessor" in (folder / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer"):
        AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "byte-pair"])
def test_the_code_of_the_card_runs(tmp_path: Path, capsys, shared_data: Path, kind: str):
    tokenizer = {
        "wordpiece": lambda: WordpieceTokenizer(WORDS),
        "unigram": lambda: train_sentencepiece(read_documents([TRAIN_PATH]), 2500),
        "byte-pair": lambda: adopt_vocabulary(shared_data / "vocab" / "pegasus_sp_test.model"),
    }[kind]()
    folder = export_tokenizer(tokenizer, tmp_path)
    card = (folder / "README.md").read_text(encoding="utf-8")
    exec(card.partition("```python\n")[2].partition("```")[0], {"folder": str(folder), "text": "天地玄黄。"})
    assert capsys.readouterr().out.endswith("\n")
