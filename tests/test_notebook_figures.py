"""The exact figures of the code-along notebook (bigram on tinyshakespeare), each reproduced by classic.py and the tokenizer.

Most need only the 65 characters and the numbers of one batch, so they run everywhere. Those that need the text look for it
at $NANOGPT_FAST_SHAKESPEARE, then at data/shakespeare_char/input.txt (`nanogpt-fast prepare shakespeare`), and skip otherwise.
"""
import hashlib
import os
from pathlib import Path

import pytest
import torch

from nanogpt_fast import classic
from nanogpt_fast.text.tokenizers import CharTokenizer

CHARS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TRAIN_LENGTH = 1003854  # nine tenths of 1,115,394 characters
STARTS = [76049, 234249, 934904, 560986]  # where seed 1337 cuts the four windows of the batch
X = torch.tensor([[24, 43, 58, 5, 57, 1, 46, 43], [44, 53, 56, 1, 58, 46, 39, 58],
                  [52, 58, 1, 58, 46, 39, 58, 1], [25, 17, 27, 10, 0, 21, 1, 54]])
Y = torch.cat([X[:, 1:], torch.tensor([[39], [1], [46], [39]])], dim=1)


@pytest.fixture(scope="module")
def text():
    for path in (os.environ.get("NANOGPT_FAST_SHAKESPEARE"), "data/shakespeare_char/input.txt"):
        if path and Path(path).is_file():
            return Path(path).read_text(encoding="utf-8")
    pytest.skip("tinyshakespeare is not here: `nanogpt-fast prepare shakespeare` fetches it, or set NANOGPT_FAST_SHAKESPEARE")


def test_E1_the_text_is_tinyshakespeare(text):
    assert len(text) == 1_115_394
    assert hashlib.sha256(text.encode()).hexdigest() == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_E2_the_vocabulary_is_65_sorted_characters():
    tokenizer = CharTokenizer.from_text(CHARS[::-1])
    assert tokenizer.vocab_size == 65 and "".join(tokenizer.itos.values()) == CHARS == "".join(sorted(CHARS))


def test_E2_the_text_has_this_vocabulary(text):
    assert CharTokenizer.from_text(text) == CharTokenizer(CHARS)


def test_E3_encoding_hii_there_and_back():
    tokenizer = CharTokenizer(CHARS)
    assert tokenizer.encode("hii there") == [46, 47, 47, 1, 58, 46, 43, 56, 43]
    assert tokenizer.decode([46, 47, 47, 1, 58, 46, 43, 56, 43]) == "hii there"


def test_E4_the_first_ids_of_the_text(text):
    assert CharTokenizer(CHARS).encode(text[:10]) == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47]


def test_E5_the_split_is_nine_tenths_to_one(text):
    train, val = classic.split(CharTokenizer(CHARS).encode(text))
    assert len(train) == TRAIN_LENGTH and val[:10] == [12, 0, 0, 19, 30, 17, 25, 21, 27, 10]


def test_E6_a_block_of_eight_holds_eight_examples():
    first = torch.tensor([[18, 47, 56, 57, 58, 1, 15, 47, 58]])
    listing = [f"when input is {context} the target: {target}"
               for context, target in classic.examples(first[:, :-1], first[:, 1:])]
    assert listing == [
        "when input is [18] the target: 47",
        "when input is [18, 47] the target: 56",
        "when input is [18, 47, 56] the target: 57",
        "when input is [18, 47, 56, 57] the target: 58",
        "when input is [18, 47, 56, 57, 58] the target: 1",
        "when input is [18, 47, 56, 57, 58, 1] the target: 15",
        "when input is [18, 47, 56, 57, 58, 1, 15] the target: 47",
        "when input is [18, 47, 56, 57, 58, 1, 15, 47] the target: 58",
    ]


def test_E6_the_batch_holds_32_examples():
    listing = list(classic.examples(X, Y))
    assert len(listing) == 32
    assert listing[0] == ([24], 43) and listing[7] == ([24, 43, 58, 5, 57, 1, 46, 43], 39)
    assert listing[8] == ([44], 53) and listing[15] == ([44, 53, 56, 1, 58, 46, 39, 58], 1)
    assert listing[16] == ([52], 58) and listing[23] == ([52, 58, 1, 58, 46, 39, 58, 1], 46)
    assert listing[24] == ([25], 17) and listing[31] == ([25, 17, 27, 10, 0, 21, 1, 54], 39)
    assert [target for _, target in listing] == Y.flatten().tolist()


def test_E7_the_batch_of_seed_1337_from_the_text(text):
    train, _ = classic.split(torch.tensor(CharTokenizer(CHARS).encode(text)))
    torch.manual_seed(1337)
    x, y = classic.get_batch(train, batch_size=4, block_size=8)
    assert x.tolist() == X.tolist() and y.tolist() == Y.tolist()


def test_E7_the_batch_of_seed_1337_from_its_four_windows_alone():
    data = torch.full((TRAIN_LENGTH,), -1)
    for start, x, y in zip(STARTS, X, Y):
        data[start:start + 8] = x
        data[start + 8] = y[-1]
    torch.manual_seed(1337)
    x, y = classic.get_batch(data, batch_size=4, block_size=8)
    assert x.tolist() == X.tolist() and y.tolist() == Y.tolist()


def bigram():
    torch.manual_seed(1337)
    return classic.Bigram(classic.ClassicConfig(vocab_size=65, block_size=8))


def test_E8_the_untrained_bigram_loses_4_8786():
    logits, loss = bigram()(X, Y)
    assert logits.shape == (32, 65)
    assert f"{loss.item():.4f}" == "4.8786"


def test_E9_what_the_untrained_bigram_writes():
    model = bigram()
    model(X, Y)
    out = model.generate(torch.zeros((1, 1), dtype=torch.long), max_new_tokens=100)
    assert CharTokenizer(CHARS).decode(out[0]) == (
        "\n" "SKIcLT;AcELMoTbvZv C?nq-QE33:CJqkOKH-q;:la!oiywkHjgChzbQ?u!3bLIgwevmyFJGUGp\n" "wnYWmnxKWWev-tDqXErVKLgJ")
