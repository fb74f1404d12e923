"""Writes ts/test/sentencepiece.json.gz: small sentencepiece models (tokenizer.model), and the ids and texts
of sentencepiece (`legacy: true`, as the official code's tokenizer) and of transformers' LlamaTokenizer (`legacy: false`).

    python scripts/parity/sentencepiece_corpus.py ts/test/sentencepiece.json.gz     # pip install sentencepiece protobuf transformers
"""
import base64
import gzip
import io
import json
import os
import random
import re
import sys
import tempfile

import sentencepiece
import transformers

WORDS = """the cat sat on a mat red circle above square ΑΣ λόγος привет мир 你好 世界 한국어 café naïve foo_bar 12 3.14 hello world""".split()
ODD = [" ", "  ", " ", "\n", "\t", "<sep>", "<s>", "</s>", "<unk>", "<ctl>", "[INST]", "<|im_start|>", "foo", "▁", "▁▁▁", "é", "e\u0301", "🙂", "\x00",
       "<0x41>", "\u3000", "\u00a0", "ﬁ", "½"]
# Name: what its model has besides; names of bos, eos, unk where they are others.
KINDS = {
    "llama": {},
    "user-defined symbols": dict(user_defined_symbols=["<sep>", "\n", "  ", "<|im_start|>", "▁▁▁", "foo"]),
    "control symbols": dict(control_symbols=["<ctl>", "[INST]"]),
    "no space in front": dict(add_dummy_prefix=False),
    "no bytes": dict(byte_fallback=False),
    "no start token": dict(bos_id=-1, eos_id=1, unk_id=0),
    "other names": dict(unk_id=2, bos_id=0, eos_id=1, unk_piece="[UNK]", bos_piece="[BOS]", eos_piece="[EOS]"),
    "padding": dict(pad_id=3),
}
# transformers 5 makes tokens of these that sentencepiece has not, or leaves characters out; its fast tokenizers look for user-defined
# symbols before anything else, and so do we.
NOT_FAST = ("no space in front", "no bytes", "no start token")
NOT_SLOW = ("user-defined symbols",)


def model(rng, more):
    corpus = [" ".join(rng.choice(WORDS) for _ in range(8)) for _ in range(400)]
    out = io.BytesIO()
    options = dict(vocab_size=380, model_type="bpe", character_coverage=1.0, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
                   normalization_rule_name="identity", remove_extra_whitespaces=False)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=out, **{**options, **more})
    return out.getvalue()


def slow(data, special, texts):
    """What the official code's tokenizer makes: sentencepiece, on what lies between special tokens. No text where there are any."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    out = []
    for text in texts:
        parts = [p for p in re.split("(" + "|".join(map(re.escape, special)) + ")", text) if p]
        ids = [i for p in parts for i in ([sp.piece_to_id(p)] if p in special else sp.encode(p))]
        plain = not any(p in special for p in parts) and sp.unk_id() not in ids
        out.append([ids, sp.decode(ids) if plain else None])
    return out


def fast(data, config, texts):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "tokenizer.model"), "wb") as f:
            f.write(data)
        for name, content in (("tokenizer_config.json", config), ("config.json", {"model_type": "llama"})):
            with open(os.path.join(folder, name), "w") as f:
                json.dump(content, f)
        t = transformers.AutoTokenizer.from_pretrained(folder)
        return [[ids, t.decode(ids)] for ids in (t.encode(text, add_special_tokens=False) for text in texts)]


def main(path):
    rng = random.Random(3)
    texts = ["", " ", "  ", " a", "a ", "a  b", "\n", "▁a"]
    texts += ["".join(rng.choice(ODD + WORDS) for _ in range(rng.randint(1, 7))) for _ in range(150)]
    cases = []
    for name, more in KINDS.items():
        data = model(rng, more)
        bos, eos, unk = (more.get(f"{t}_piece", usual) for t, usual in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>")))
        names = dict(eos_token=eos, unk_token=unk, **({} if more.get("bos_id") == -1 else dict(bos_token=bos)))
        for legacy in (True, False):
            if name in (NOT_SLOW if legacy else NOT_FAST):
                continue
            config = dict(tokenizer_class="LlamaTokenizer", legacy=legacy, clean_up_tokenization_spaces=False, **names)
            special = [*names.values(), *more.get("control_symbols", [])] + (["<pad>"] if "pad_id" in more else [])
            results = slow(data, special, texts) if legacy else fast(data, config, texts)
            cases.append({"name": name, "model": base64.b64encode(data).decode(), "config": config, "results": results})
    made = f"sentencepiece {sentencepiece.__version__}, transformers {transformers.__version__}"
    with gzip.GzipFile(path, "wb", 9, mtime=0) as f:
        f.write(json.dumps({"made_with": made, "texts": texts, "cases": cases}, ensure_ascii=False, separators=(",", ":")).encode())


if __name__ == "__main__":
    main(sys.argv[1])
