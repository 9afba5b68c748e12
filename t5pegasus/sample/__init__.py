"""160 short Chinese documents with titles, written for this project: 140 to train on, 20 held out.

News-like, encyclopaedic, technical and narrative texts in equal parts, one JSON object {id, title, text, genre} a
line. They make the quickstart and the tests independent of any download; they are far too few to learn Chinese from.
"""

from pathlib import Path

TRAIN_PATH = Path(__file__).with_name("train.jsonl")
HELDOUT_PATH = Path(__file__).with_name("heldout.jsonl")
