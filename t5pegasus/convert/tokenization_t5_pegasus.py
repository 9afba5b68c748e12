"""T5 PEGASUS's tokenizer for Hugging Face transformers; exported beside the vocab.txt it reads.

    AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)

Words of jieba's dictionary first (with `dictionary`), BERT's basic and wordpiece rules for the rest; the ids of
bert4keras and of t5pegasus. Sources are `[CLS] text [SEP]`, targets (`text_target=`) `text [SEP]`, because decoding
starts with [CLS]. It stands alone: transformers, and rjieba or jieba, are all it needs.
"""

import os
import re
import shutil
import unicodedata

from transformers import PreTrainedTokenizer  # pyright: ignore[reportMissingImports]

VOCAB_FILES_NAMES = {"vocab_file": "vocab.txt"}
HAN = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f"
)
HAN_CHARACTER = re.compile(f"[{HAN}]")
HAN_OR_RUN = re.compile(f"[{HAN}]|[^{HAN} \n\r\t]+")
CJK_PUNCTUATION = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】〔〕〖〗"
    "〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏﹑﹔·！？｡。"
)
MAX_WORD_CHARACTERS = 200


class T5PegasusTokenizer(PreTrainedTokenizer):
    """Tokens of a `vocab.txt`, one per line."""

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - what transformers asks for

    def __init__(
        self,
        vocab_file,
        dictionary=True,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        eos_token="[SEP]",
        split_special_tokens=True,
        **kwargs,
    ):
        with open(vocab_file, encoding="utf-8", newline="\n") as file:  # noqa: PTH123 - a token may be U+2028
            self._tokens = [line.removesuffix("\n").removesuffix("\r") for line in file]
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        self._vocab_file, self._for_target = vocab_file, False
        self._cut = _load_jieba() if dictionary else HAN_OR_RUN.findall
        super().__init__(
            dictionary=dictionary,
            unk_token=unk_token,
            sep_token=sep_token,
            pad_token=pad_token,
            cls_token=cls_token,
            eos_token=eos_token,
            split_special_tokens=split_special_tokens,
            **kwargs,
        )

    @property
    def vocab_size(self):
        """Number of tokens."""
        return len(self._tokens)

    def get_vocab(self):
        """Token → id."""
        return dict(self._ids)

    def _tokenize(self, text, **_):
        tokens = []
        for word in self._cut(_normalise(text)):
            if word in self._ids:
                tokens.append(word)
            else:
                tokens += [piece for part in _split_basic(word) for piece in self._split_wordpieces(part)]
        return tokens

    def _split_wordpieces(self, word):
        if len(word) > MAX_WORD_CHARACTERS:
            return [self.unk_token]
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in self._ids), None)
            if end is None:
                return [self.unk_token]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self._ids[self.unk_token])

    def _convert_id_to_token(self, index):
        return self._tokens[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """`[CLS] text [SEP]` of a source, `text [SEP]` of a target."""
        start = [] if self._for_target else [self.cls_token_id]
        second = [] if token_ids_1 is None else [*token_ids_1, self.sep_token_id]
        return [*start, *token_ids_0, self.sep_token_id, *second]

    def _switch_to_input_mode(self):
        self._for_target = False

    def _switch_to_target_mode(self):
        self._for_target = True

    def convert_tokens_to_string(self, tokens):
        """The text of tokens by bert4keras's rules for spaces; `[…]` tokens vanish."""
        pieces, after_han = [], False
        for token in tokens:
            if token[:1] == "[" and token[-1:] == "]":
                continue
            if token[:2] == "##":
                pieces.append(token[2:])
            elif len(token) == 1 and HAN_CHARACTER.match(token):
                pieces.append(token)
            elif len(token) == 1 and _is_punctuation(token):
                pieces.append(token + " ")
            elif after_han:
                pieces.append(token)
            else:
                pieces.append(" " + token)
            after_han = HAN_CHARACTER.match(pieces[-1][-1:]) is not None if pieces[-1] else after_han
        text = re.sub(" +", " ", "".join(pieces))
        text = re.sub("' (re|m|s|t|ve|d|ll) ", r"'\1 ", text)
        text = re.sub(f"([{re.escape(CJK_PUNCTUATION + '+-/={(<[')}]) ", r"\1", text)
        return re.sub(r"(\d\.) (\d)", r"\1\2", text).strip()

    def save_vocabulary(self, save_directory, filename_prefix=None):
        """Copy vocab.txt."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + VOCAB_FILES_NAMES["vocab_file"]
        target = os.path.join(save_directory, name)  # noqa: PTH118 - a string is wanted
        if os.path.abspath(target) != os.path.abspath(self._vocab_file):  # noqa: PTH100
            shutil.copyfile(self._vocab_file, target)
        return (target,)


def _load_jieba():
    """Jieba's segmentation without its model of unknown words; rjieba is the faster one, with the same words."""
    try:
        import rjieba

        return lambda text: rjieba.cut(text, False)
    except ImportError:
        import jieba  # pyright: ignore[reportMissingImports]

        return lambda text: jieba.cut(text, HMM=False)


def _normalise(text):
    decomposed = unicodedata.normalize("NFD", text.lower())
    return "".join(character for character in decomposed if unicodedata.category(character) != "Mn")


def _is_punctuation(character):
    code = ord(character)
    ascii_sign = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return ascii_sign or unicodedata.category(character).startswith("P")


def _split_basic(word):
    spaced = []
    for character in word:
        if HAN_CHARACTER.match(character) or _is_punctuation(character):
            spaced += (" ", character, " ")
        elif character in " \n\r\t" or unicodedata.category(character) == "Zs":
            spaced.append(" ")
        elif character not in "\0\ufffd" and unicodedata.category(character) not in ("Cc", "Cf"):
            spaced.append(character)
    return "".join(spaced).split()
