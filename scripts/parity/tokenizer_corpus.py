"""Writes ts/test/golden/tokenizers.json.gz: small tokenizers of every kind the package reads, and what Hugging Face's Rust library
makes of texts that are hard for them (ids, where each token starts, and the text that comes back).

    python scripts/parity/tokenizer_corpus.py ts/test/golden/tokenizers.json.gz     # pip install tokenizers
"""
import gzip
import json
import random
import sys

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = """the a of and in is it was what this picture shows red blue box cat dog two three running water tree house don't I'll
we've they're can't ICH straße Ärger naïve café résumé coöperate jalapeño Ångström œuvre Ħal ΑΣ ΟΔΥΣΣΕΥΣ λόγος Σίσυφος ς σΣ ΣΑΣ.
İstanbul ısı IŞIK ЖИЗНЬ мир объект ёлка ǅ ﬁn ﬂow ½ ² ① Ⅷ ㎏ ｆｕｌｌ Ｗｉｄｔｈ שלום עולם مرحبا بالعالم ١٢٣ नमस्ते दुनिया १२३ สวัสดี ชาวโลก
漢字 かな カタカナ ｶﾅ 你好 世界 한국어 각 각 e\u0301 n\u0303 A\u030a o\u0308\u0304 \u1e9b\u0323 q\u0307\u0323 x=1; def f(x): return x**2 if (a<b) &&
!ok foo_bar fooBar HTMLParser 3.14 1,000,000 2024-05-01 10:30 a@b.co #tag $5 50% <b> </b> <image> [INST] == != ... -- — “q” ‘s ’t""".split()
HARD = ["", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028", "\x00", "\x00a",
        "\x07\x1b", "\x7f", "\x85", "a\x85b", "\ufffd", "👍", "👍🏽", "👨\u200d👩\u200d👧", "🇩🇪🇫🇷", "e\u0301", "\u0301", " \u0301",
        "a" * 70, "ab" * 40, " " * 40, "\n" * 9, "1234567890123", "Σ", "ΑΣ", "ΑΣ ΑΣΑ", "ΑΣ.", "ΑΣ'Α", "aΣ\u0301 b", "İ", "ŉ", "ﬃ", "ß", "ẞ",
        "각", "각", "\u1100\u1161\u11a8", "𝔘𝔫𝔦", "𐍈", "▁", "▁▁", " ▁ ", "a▁b", "Ġ", "Ċ", "<0x41>", "<0x0A>", "<unk>", "<s>", "</s>", "<s> ",
        " <s>", "a<s>b", "</s></s>", "<s", "<<s>>", "<sep>", "a<sep>b", " <sep> ", "<sep><sep>", "sep", "Sep SEP sep", "asepb", "sep-sep",
        "sep_ sep9 9sep", "<MASK>", " <mask> ", "x <mask>  y", "x  <mask>\ty", "<mask>", "<image>\nWhat is this?", "don't DON'T I'LL",
        "'s 'S 're", " 's", "a's", "word \n next", "trailing  ", "  leading", "tab\tbetween", "a  b   c", "a\n\nb", "a \n\n b", "é", "É",
        "ΟΔΥΣΣΕΥΣ ΣΑΣ", "x²y³", "⅓ ①", "ｶﾞ", "カ\u3099", "ﷺ", "\u0958", "\u2126", "\u212b", "a\u0327\u0301", "a\u0301\u0327", "\u0344",
        "price: $1,234.56!!", "http://a.b/c?d=e&f", "def f(x):\n    return x\n", "\tif x:\r\n\t\tpass", "a\u200db", "–—", "¿¡", "٣٤", "१२",
        "<s>\u0301\u0327x", "</s>\u0327\u0301", "\n\n\nx", "x \n\n y", "a \n \n b  \n", "tail \n", "'ſ a'\u212a 'S", "ab\u20acab\u20ac ▁ab", "𝔘𐍈\n𝔘"]


def texts(n, rng):
    """n texts: the hard ones, then mixtures of words, hard pieces and white space."""
    out = list(dict.fromkeys(HARD))
    gaps = [" "] * 8 + ["  ", "\n", "", "", "\t", "\u00a0", " , ", ". "]
    seen = set(out)
    while len(out) < n:
        parts = []
        for _ in range(rng.randint(1, 9)):
            parts.append(rng.choice(WORDS) if rng.random() < 0.8 else rng.choice(HARD))
            if rng.random() < 0.1:
                parts[-1] = rng.choice([str.upper, str.lower, str.title])(parts[-1])
            parts.append(rng.choice(gaps))
        text = "".join(parts[:-1])[:160]
        if text not in seen:
            seen.add(text)
            out.append(text)
    return out


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
BYTES = [f"<0x{b:02X}>" for b in range(256)]
N, P, D = normalizers, pre_tokenizers, decoders


def trained(corpus, normalizer=None, pre=None, decoder=None, *, size=700, first=("<unk>", "<s>", "</s>"), byte_level=False,
            post=None, added=(), model=None, **bpe):
    """A tokenizer whose pieces are learned from the corpus; `added` AddedTokens, `model` changes its definition."""
    t = Tokenizer(models.BPE(**{k: v for k, v in bpe.items() if k != "ignore_merges"}))
    t.normalizer, t.pre_tokenizer = normalizer, pre
    alphabet = P.ByteLevel.alphabet() if byte_level else []
    names = list(first) + (BYTES if bpe.get("byte_fallback") else [])
    t.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=size, special_tokens=names, initial_alphabet=alphabet, show_progress=False, limit_alphabet=300,
        **{k: bpe[k] for k in ("continuing_subword_prefix", "end_of_word_suffix") if k in bpe}))
    d = json.loads(t.to_str())
    d["added_tokens"] = [a for a in d["added_tokens"] if a["content"] in first]
    if "ignore_merges" in bpe:
        d["model"]["ignore_merges"] = bpe["ignore_merges"]
    if model:
        model(d["model"])
    t = Tokenizer.from_str(json.dumps(d))
    if decoder is not None:
        t.decoder = decoder
    if post is not None:
        t.post_processor = post
    for a in added:
        (t.add_special_tokens if a.special else t.add_tokens)([a])
    return t


def tokenizers_of(corpus):
    sp = dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    unk = dict(unk_token="<unk>")
    end = D.Sequence([D.Replace("▁", " "), D.ByteFallback(), D.Fuse(), D.Strip(" ", 1, 0)])
    level = lambda **o: P.ByteLevel(**{"add_prefix_space": False, "use_regex": True, **o})
    split = lambda pattern: P.Sequence([P.Split(Regex(pattern), "isolated"), level(use_regex=False)])
    byte = dict(byte_level=True, decoder=D.ByteLevel(), first=("<s>", "</s>"))
    marks = [AddedToken("<mask>", lstrip=True, special=True, normalized=False), AddedToken("<sep>", normalized=True),
             AddedToken("sep", single_word=True, normalized=False), AddedToken("<pad>", rstrip=True, special=True, normalized=False)]
    upper = [AddedToken("RED", normalized=True), AddedToken("ﬁn", normalized=True)]
    yield "llama", trained(corpus, N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")]), None, end, **sp)
    yield "metaspace first", trained(corpus, None, P.Metaspace("▁", "first", split=False), end, added=marks, **sp)
    yield "metaspace always", trained(corpus, N.Strip(), P.Metaspace("▁", "always", split=True), D.Metaspace("▁", "always"), **unk)
    yield "metaspace first, strip", trained(corpus, N.Strip(left=True, right=False), P.Metaspace("▁", "first", split=True),
                                            D.Metaspace("▁", "first"), added=marks, **sp)
    yield "metaspace never", trained(corpus, None, P.Metaspace("▁", "never", split=True), D.Metaspace("▁", "never"), fuse_unk=True, **unk)
    yield "gemma", trained(corpus, N.Replace(" ", "▁"), P.Split(" ", "merged_with_previous"),
                           D.Sequence([D.Replace("▁", " "), D.ByteFallback(), D.Fuse()]),
                           added=[AddedToken("\n", normalized=False), AddedToken("\n\n", normalized=False)], **sp)
    yield "gpt2", trained(corpus, None, level(), **byte)
    yield "gpt2 prefix space", trained(corpus, None, level(add_prefix_space=True), added=marks, **byte)
    yield "llama 3", trained(corpus, None, split(LLAMA3), ignore_merges=True, added=marks, **byte)
    yield "qwen", trained(corpus, N.NFC(), split(QWEN), **byte)
    yield "o200k", trained(corpus, None, split(O200K), **byte)
    yield "phi", trained(corpus, None, level(), added=[AddedToken(" " * n, normalized=True) for n in (4, 3, 2)] +
                         [AddedToken("\t\t", normalized=True)], **byte)
    yield "clip", trained(corpus, N.Sequence([N.NFC(), N.Replace(Regex(r"\s+"), " "), N.Lowercase()]),
                          P.Sequence([P.Split(Regex(CLIP), "removed", invert=True), level()]),
                          D.ByteLevel(), byte_level=True, first=("<|startoftext|>", "<|endoftext|>"), end_of_word_suffix="</w>",
                          unk_token="<|endoftext|>",
                          post=processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0), False, False))
    yield "lowercase", trained(corpus, N.Lowercase(), P.Whitespace(), D.Fuse(), added=marks + upper, **unk)
    yield "lowercase metaspace", trained(corpus, N.Sequence([N.NFD(), N.Lowercase(), N.StripAccents()]),
                                         P.Metaspace("▁", "always", split=False), end, added=marks, **sp)
    yield "nfkc", trained(corpus, N.Sequence([N.NFKC(), N.Strip()]), P.Metaspace("▁", "first", split=True), end, added=marks + upper, **sp)
    yield "nfkd digits", trained(corpus, N.NFKD(), P.Sequence([P.WhitespaceSplit(), P.Digits(individual_digits=True), P.Punctuation()]),
                                 D.Fuse(), **unk)
    yield "subwords", trained(corpus, None, P.WhitespaceSplit(), D.BPEDecoder("</w>"), continuing_subword_prefix="##",
                              end_of_word_suffix="</w>", **unk)
    yield "starcoder", trained(corpus, None, P.Sequence([P.Digits(individual_digits=True), level()]), **byte)
    yield "deepseek", trained(corpus, N.Sequence([]), P.Sequence([
        P.Split(Regex(r"[\r\n]"), "isolated"), P.Split(Regex(r"\s?\p{L}+"), "isolated"), P.Split(Regex(r"\s?\p{P}+"), "isolated"),
        P.Split(Regex(r"[一-龥ࠀ-一가-퟿]+"), "isolated"), P.Digits(individual_digits=True), level(use_regex=False)]), **byte)
    yield "splits", trained(corpus, N.Replace(Regex(r"\d"), "0"), P.Sequence([
        P.Split(Regex(r"[,.]"), "merged_with_next"), P.Split("-", "contiguous"), P.Split(Regex(r"[=!]+"), "removed"),
        P.Punctuation("merged_with_previous")]), D.Fuse(), fuse_unk=True, **unk)
    yield "replace", trained(corpus, N.Sequence([N.Replace("``", '"'), N.Replace(Regex(r" {2,}"), " "), N.Prepend("▁"), N.Replace(" ", "▁")]),
                             None, D.Sequence([D.Replace("▁", " "), D.Fuse(), D.Strip(" ", 1, 1)]), added=marks, **unk)
    yield "no unknown", trained(corpus, None, P.CharDelimiterSplit("_"), D.Fuse(), first=("</s>",), size=400)
    yield "gpt2, atomic", trained(corpus, None, split(GPT2), **byte)
    yield "cl100k", trained(corpus, None, split(CL100K), **byte)
    yield "legacy, added", trained(corpus, N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")]), None, end, added=[
        AddedToken("<sep>", normalized=True), AddedToken("\n", lstrip=True, rstrip=True, normalized=False),
        AddedToken(" ", rstrip=True, normalized=False), AddedToken("AND", normalized=True, single_word=True, lstrip=True)], **sp)
    yield "marks", trained(corpus, N.Sequence([N.NFKC(), N.NFD()]), P.Punctuation("contiguous"), D.Fuse(), **unk)
    yield "empty matches", trained(corpus, N.Replace(Regex(r"\s*$"), " "), P.Sequence([
        P.Split(Regex(r"(?<=[a-z])(?=[A-Z])|$"), "merged_with_previous"), P.Split(Regex(r"x*"), "isolated")]), D.Replace(Regex("a*"), "-"), **unk)
    yield "left out", trained(corpus, N.Replace(" ", "▁"), None, D.Metaspace("▁", "never"), first=("</s>",), size=400)
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    yield "template", trained(corpus, N.Lowercase(), P.Metaspace("▁", "first", split=True), end, post=template, added=marks, **sp)


def utf16(text):
    """UTF-16 offset of each character, and of the end."""
    at, out = 0, []
    for c in text:
        out.append(at)
        at += 2 if ord(c) > 0xffff else 1
    return out + [at]


def decoded(t, ids, skip):
    """The text of ids; null where the Rust library panics (its Strip decoder does on a text shorter than what it strips)."""
    try:
        return t.decode(ids, skip_special_tokens=skip)
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        return None


def main(path):
    rng = random.Random(7)
    every = texts(2400, rng)
    corpus = [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(400)]
    corpus += ["x \n\n y \n \n z  \n", "'ſ a'\u212a I'S"] * 60
    made = list(tokenizers_of(corpus))
    cases = []
    for k, (name, t) in enumerate(made):
        definition = json.loads(t.to_str())
        plain = Tokenizer.from_str(json.dumps({**definition, "post_processor": None}))
        results = []
        for i, text in enumerate(every):
            if i >= len(HARD) and i % len(made) != k and (i * 7 + 3) % len(made) != k:
                continue
            e, at = plain.encode(text, add_special_tokens=False), utf16(text)
            full = t.encode(text).ids
            results.append([i, e.ids, [at[start] for start, _ in e.offsets], None if full == e.ids else full,
                            decoded(t, e.ids, False), decoded(t, e.ids, True)])
        cases.append({"name": name, "definition": definition, "results": results})
    out = {"made_with": f"tokenizers {tokenizers.__version__}", "texts": every, "tokenizers": cases}
    data = json.dumps(out, ensure_ascii=False, separators=(",", ":")).encode()
    with gzip.GzipFile(path, "wb", 9, mtime=0) as f:
        f.write(data)
    print(f"{len(made)} tokenizers, {len(every)} texts, {sum(len(c['results']) for c in cases)} results, {len(data)} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
