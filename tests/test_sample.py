"""What the embedded sample promises."""

import json
import re

from t5pegasus.sample import HELDOUT_PATH, TRAIN_PATH


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_the_sample_is_what_it_says():
    train, heldout = read(TRAIN_PATH), read(HELDOUT_PATH)
    documents = train + heldout
    assert (len(train), len(heldout)) == (140, 20)
    assert len({each["id"] for each in documents}) == len({each["title"] for each in documents}) == 160
    for genre in ("news", "encyclopaedia", "technical", "narrative"):
        assert sum(each["genre"] == genre for each in documents) == 40
        assert sum(each["genre"] == genre for each in heldout) == 5
    for each in documents:
        assert 150 <= len(each["text"]) <= 500, each["id"]
        assert 5 <= len(re.findall(r"[。！？]", each["text"])) <= 15, each["id"]
        assert 6 <= len(each["title"]) <= 20, each["id"]
        assert not re.search(r"[,;:?!\"'()]|[，。；：、]{2}", each["text"]), each["id"]


def test_no_sentence_stands_in_two_documents():
    seen: dict[str, str] = {}
    for each in read(TRAIN_PATH) + read(HELDOUT_PATH):
        for sentence in re.split(r"[。！？\n]", each["text"]):
            if len(sentence) >= 12:
                assert seen.setdefault(sentence, each["id"]) == each["id"], sentence
