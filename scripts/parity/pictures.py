"""Pictures of every kind that people have, and what Pillow makes of them: `Image.open(f).convert('RGB')`.

    python scripts/parity/pictures.py ts/test/golden/pictures        # tiny ones: pictures.json beside the files
    python scripts/parity/pictures.py /tmp/campaign --side 67 45     # larger ones, for a comparison of all

Needs Pillow 12 and numpy. pictures.json has, for each file, the size and the SHA-256 of the RGB bytes, or the error where
Pillow refuses. The writers here make what Pillow reads and does not write.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

warnings.simplefilter("ignore")
FILES: dict[str, bytes] = {}


def put(name, data):
    assert name not in FILES, name
    FILES[name] = bytes(data)


def saved(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


class Art:
    """The same motif in every kind of sample: gradients, a block of one colour, noise."""

    def __init__(self, w, h):
        self.w, self.h = w, h
        self.rng = np.random.RandomState(5)
        y, x = np.mgrid[0:h, 0:w]
        base = np.stack([x * 255 // max(w - 1, 1), y * 255 // max(h - 1, 1), (x * 7 + y * 13) % 256], -1)
        base[h // 3 : h // 2, w // 3 : w // 2] = (250, 20, 90)
        noise = self.rng.randint(0, 256, (h, w, 3))
        self.rgb = np.where(((x + y) % 5 == 0)[..., None], noise, base).astype(np.uint8)
        self.alpha = np.where((x + 2 * y) % 4 == 0, 0, (x * 9 + y * 31) % 256).astype(np.uint8)
        self.grey = self.rgb[..., 0] // 2 + self.rgb[..., 1] // 2
        self.wide = ((self.rgb.astype(np.uint32) * 257 + self.rng.randint(0, 256, (h, w, 3))) % 65536).astype(np.uint16)
        self.low = (self.wide[..., 0] % 700).astype(np.uint16)  # values around 255: where clipping shows

    def samples(self, bits, channels):
        if bits == 16:
            full = np.dstack([self.wide, self.alpha.astype(np.uint16) * 257 + 3])
        else:
            full = np.dstack([self.rgb, self.alpha]) >> (8 - bits)
        if channels == 1:
            return full[..., :1]
        if channels == 2:
            return full[..., [0, 3]]
        return full[..., :channels]

    def image(self, mode):
        rgb = Image.fromarray(self.rgb)
        if mode == "RGBA":
            return Image.fromarray(np.dstack([self.rgb, self.alpha]))
        if mode == "LA":
            return Image.merge("LA", [Image.fromarray(self.grey), Image.fromarray(self.alpha)])
        if mode == "P":
            return rgb.quantize(23, dither=0)
        if mode == "I;16":
            return Image.fromarray(self.wide[..., 0])
        if mode == "F":
            return Image.fromarray((self.wide[..., 0] / 200 - 20).astype(np.float32))
        if mode == "I":
            return Image.fromarray(self.low.astype(np.int32) - 100)
        return rgb.convert(mode)


def packed(samples, bits, order=">"):
    """[h, w, c] as rows of bytes."""
    h, w, c = samples.shape
    flat = samples.reshape(h, w * c)
    if bits == 16:
        return [row.astype(order + "u2").tobytes() for row in flat]
    if bits == 8:
        return [row.astype(np.uint8).tobytes() for row in flat]
    spread = ((flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1).reshape(h, -1)
    return [np.packbits(row.astype(np.uint8)).tobytes() for row in spread]


# ---- PNG

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, bits, colour, before=(), interlace=0, after=(), cut=None):
    h, w, _ = samples.shape
    if interlace:
        parts = [samples[y0::dy, x0::dx] for x0, y0, dx, dy in ADAM7]
        rows = [r for p in parts if p.size for r in packed(p, bits)]
    else:
        rows = packed(samples, bits)
    data = zlib.compress(b"".join(b"\0" + r for r in rows))[:cut]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, interlace))
    middle = b"".join(chunk(k, d) for k, d in before)
    return SIGNATURE + head + middle + chunk(b"IDAT", data) + b"".join(chunk(k, d) for k, d in after) + chunk(b"IEND", b"")


def pngs(art):
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
    palette = [(b"PLTE", art.rng.randint(0, 256, 768).astype(np.uint8).tobytes())]
    for colour, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items():
        for bits in depths:
            s = art.samples(bits, channels[colour])
            before = [(b"PLTE", palette[0][1][: 3 << bits])] if colour == 3 else []
            for interlace in (0, 1):
                put(f"c{colour}-{bits}{'-adam7' if interlace else ''}.png", png(s, bits, colour, before, interlace))
            if colour == 3:
                put(f"c3-{bits}-trns.png", png(s, bits, 3, before + [(b"tRNS", bytes([0, 128, 255])[: 1 << bits])]))
            if colour in (0, 2):
                key = b"".join(struct.pack(">H", int(v)) for v in s[1, 1])
                put(f"c{colour}-{bits}-trns.png", png(s, bits, colour, [(b"tRNS", key)]))
    rgb, grey = art.samples(8, 3), art.samples(8, 1)
    put("c0-16-low.png", png(art.low[..., None], 16, 0))
    put("c2-8-plte.png", png(rgb, 8, 2, palette))
    put("c3-8-short.png", png(grey, 8, 3, [(b"PLTE", bytes(range(60)))]))
    put("c3-8-none.png", png(grey, 8, 3))
    put("gama.png", png(rgb, 8, 2, [(b"gAMA", struct.pack(">I", 100000))]))
    put("gama-grey16.png", png(art.samples(16, 1), 16, 0, [(b"gAMA", struct.pack(">I", 45455))]))
    put("srgb.png", png(rgb, 8, 2, [(b"sRGB", b"\0")]))
    put("sbit.png", png(rgb, 8, 2, [(b"sBIT", b"\5\6\5")]))
    put("bkgd.png", png(art.samples(8, 4), 8, 6, [(b"bKGD", struct.pack(">HHH", 9, 99, 200))]))
    put("cicp.png", png(rgb, 8, 2, [(b"cICP", bytes([9, 16, 0, 1]))]))
    exif = Image.Exif()
    exif[0x0112] = 6
    put("exif.png", saved(art.image("RGB"), "PNG", exif=exif))
    from PIL import ImageCms

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    put("iccp.png", saved(art.image("RGB"), "PNG", icc_profile=icc))
    frames = [art.image("RGB"), art.image("RGB").rotate(180)]
    put("apng.png", saved(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    put("apng-default.png", saved(frames[0], "PNG", save_all=True, append_images=frames, default_image=True))
    put("text.png", png(rgb, 8, 2, [(b"tEXt", b"Comment\0hello")]))
    whole = png(rgb, 8, 2)
    put("trailing.png", whole + b"garbage" * 9)
    put("no-iend.png", whole[:-12])
    put("cut.png", whole[: len(whole) * 2 // 3])
    put("short-data.png", png(rgb, 8, 2, cut=-9))
    put("few-rows.png", png(rgb, 8, 2, cut=len(whole) // 2))
    bad = bytearray(whole)
    bad[len(whole) // 2] ^= 255
    put("flipped.png", bad)
    bad = bytearray(whole)
    bad[29] ^= 1
    put("ihdr-crc.png", bad)
    bad = bytearray(whole)
    bad[-14] ^= 1
    put("idat-crc.png", bad)
    anc = png(rgb, 8, 2, [(b"tEXt", b"Comment\0hello")])
    put("text-crc.png", anc.replace(b"hello", b"hallo"))
    put("unknown-critical.png", png(rgb, 8, 2, [(b"ABCD", b"x")]))
    put("zero.png", png(rgb[:1, :1], 8, 2).replace(struct.pack(">II", 1, 1), struct.pack(">II", 0, 1)))
    put("c2-4.png", png(art.samples(4, 3), 4, 2))


# ---- JPEG


def jpegs(art):
    rgb, grey, cmyk = art.image("RGB"), art.image("L"), art.image("CMYK")
    plain = saved(rgb, "JPEG", quality=85)
    put("ycc-420.jpg", plain)
    for name, s in {"444": "4:4:4", "422": "4:2:2", "411": "4:1:1"}.items():
        put(f"ycc-{name}.jpg", saved(rgb, "JPEG", quality=90, subsampling=s))
    # luma sampled 1x2: the table of components says it, the scan is the same as that of 2x1 turned; made by turning the header
    put("grey.jpg", saved(grey, "JPEG"))
    put("progressive.jpg", saved(rgb, "JPEG", progressive=True, quality=70))
    put("progressive-grey.jpg", saved(grey, "JPEG", progressive=True))
    put("low.jpg", saved(rgb, "JPEG", quality=5))
    put("best.jpg", saved(rgb, "JPEG", quality=100, subsampling=0))
    put("restart.jpg", saved(rgb, "JPEG", restart_marker_blocks=1))
    put("restart-rows.jpg", saved(rgb, "JPEG", restart_marker_rows=1, subsampling="4:2:2"))
    put("rgb-adobe.jpg", saved(rgb, "JPEG", keep_rgb=True))
    adobe = saved(cmyk, "JPEG", quality=90)
    put("cmyk.jpg", adobe)
    put("cmyk-progressive.jpg", saved(cmyk, "JPEG", progressive=True))
    at = adobe.index(b"\xff\xee")
    put("cmyk-no-adobe.jpg", adobe[:at] + adobe[at + 2 + struct.unpack(">H", adobe[at + 2 : at + 4])[0] :])
    bent = bytearray(adobe)
    bent[at + 15] = 2
    put("ycck.jpg", bent)
    for o in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = o
        put(f"exif-{o}.jpg", saved(rgb, "JPEG", exif=exif))
    from PIL import ImageCms

    put("icc.jpg", saved(rgb, "JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()))
    put("mpo.jpg", saved(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]))
    put("trailing.jpg", plain + bytes(500))
    put("leading-ff.jpg", plain[:2] + b"\xff\xff" + plain[2:])
    put("no-eoi.jpg", plain[:-2])
    put("cut.jpg", plain[: len(plain) - len(plain) // 4])
    put("cut-progressive.jpg", saved(rgb, "JPEG", progressive=True)[:-60])
    put("cut-header.jpg", plain[:60])
    bad = bytearray(plain)
    for at in range(len(plain) - 60, len(plain) - 50):
        bad[at] = 0x5A
    put("damaged.jpg", bad)
    marker = bytearray(plain)
    marker[-40:-38] = b"\xff\xd9"
    put("early-eoi.jpg", marker)
    deep = bytearray(plain)
    at = deep.index(b"\xff\xc0")
    deep[at + 4] = 12
    put("12-bit.jpg", deep)
    deep = bytearray(plain)
    deep[at + 1] = 0xC3
    put("lossless.jpg", deep)
    jfif = plain.index(b"JFIF")
    bare = plain[:2] + plain[jfif - 4 + 2 + 16 :]
    put("no-jfif.jpg", bare)
    # without JFIF and Adobe the components' names decide: R, G, B
    named = bytearray(saved(rgb, "JPEG", subsampling=0, quality=90))
    sof, sos = named.index(b"\xff\xc0"), named.index(b"\xff\xda")
    for k, letter in enumerate(b"RGB"):
        named[sof + 10 + 3 * k] = letter
        named[sos + 5 + 2 * k] = letter
    at = named.index(b"\xff\xe0")
    put("named-rgb.jpg", named[:at] + named[at + 18 :])
    put("named-rgb-jfif.jpg", named)


# ---- GIF


def lzw(indices, bits):
    """Codes without compression: a clear code as often as needed keeps the width."""
    size, clear = max(bits, 2), 1 << max(bits, 2)
    out, acc, n = bytearray(), 0, 0

    def emit(code):
        nonlocal acc, n
        acc |= code << n
        n += size + 1
        while n >= 8:
            out.append(acc & 255)
            acc >>= 8
            n -= 8

    for i, v in enumerate(indices):
        if i % (clear - 2) == 0:
            emit(clear)
        emit(int(v))
    emit(clear + 1)
    if n:
        out.append(acc & 255)
    blocks = b"".join(bytes([len(out[i : i + 255])]) + bytes(out[i : i + 255]) for i in range(0, len(out), 255))
    return bytes([size]) + blocks + b"\0"


def gif_frame(indices, at=(0, 0), palette=None, interlace=False, transparent=None, disposal=0, bits=4):
    h, w = indices.shape
    control = b""
    if transparent is not None or disposal:
        control = struct.pack("<BBBBHBB", 33, 0xF9, 4, (transparent is not None) | disposal << 2, 5, transparent or 0, 0)
    flags = (128 | (len(palette) // 3).bit_length() - 2 if palette else 0) | (64 if interlace else 0)
    if interlace:
        rows = [*range(0, h, 8), *range(4, h, 8), *range(2, h, 4), *range(1, h, 2)]
        indices = indices[rows]
    return control + struct.pack("<BHHHHB", 44, *at, w, h, flags) + (palette or b"") + lzw(indices.ravel(), bits)


def gif(screen, palette, frames, background=0, version=b"GIF89a"):
    flags = 128 | (len(palette) // 3).bit_length() - 2 if palette else 0
    head = version + struct.pack("<HHBBB", *screen, flags, background, 0)
    return head + (palette or b"") + b"".join(frames) + b";"


def gifs(art):
    w, h = art.w, art.h
    pal = art.rng.randint(0, 256, 48).astype(np.uint8).tobytes()
    local = art.rng.randint(0, 256, 48).astype(np.uint8).tobytes()
    ramp = bytes(v for i in range(16) for v in (17 * i,) * 3)
    idx = art.grey >> 4
    small = idx[: h // 2, : w // 2]
    put("global.gif", gif((w, h), pal, [gif_frame(idx)]))
    put("87a.gif", gif((w, h), pal, [gif_frame(idx)], version=b"GIF87a"))
    put("local.gif", gif((w, h), pal, [gif_frame(idx, palette=local)]))
    put("local-only.gif", gif((w, h), None, [gif_frame(idx, palette=local)]))
    put("no-palette.gif", gif((w, h), None, [gif_frame(idx)]))
    put("ramp.gif", gif((w, h), ramp, [gif_frame(idx)]))
    put("interlaced.gif", gif((w, h), pal, [gif_frame(idx, interlace=True)]))
    put("transparent.gif", gif((w, h), pal, [gif_frame(idx, transparent=3)], background=5))
    put("transparent-local.gif", gif((w, h), pal, [gif_frame(idx, transparent=3, palette=local)], background=5))
    put("transparent-ramp.gif", gif((w, h), ramp, [gif_frame(idx, transparent=3)], background=5))
    for b in (0, 5):
        put(f"offset-{b}.gif", gif((w, h), pal, [gif_frame(small, (3, 2))], background=b))
        put(f"offset-transparent-{b}.gif", gif((w, h), pal, [gif_frame(small, (3, 2), transparent=7)], background=b))
        put(f"offset-local-{b}.gif", gif((w, h), pal, [gif_frame(small, (3, 2), palette=local)], background=b))
        put(f"offset-local-only-{b}.gif", gif((w, h), None, [gif_frame(small, (3, 2), palette=local)], background=b))
        put(f"offset-ramp-{b}.gif", gif((w, h), ramp, [gif_frame(small, (3, 2))], background=b))
        put(
            f"offset-lt-{b}.gif",
            gif((w, h), pal, [gif_frame(small, (3, 2), palette=local, transparent=4)], background=b),
        )
    for d in (1, 2, 3):
        put(f"disposal-{d}.gif", gif((w, h), pal, [gif_frame(small, (1, 1), disposal=d, transparent=2), gif_frame(idx)]))
    put("larger-frame.gif", gif((w - 4, h - 3), pal, [gif_frame(idx)]))
    put("outside.gif", gif((w, h), pal, [gif_frame(small, (w - 2, h - 2))]))
    put("zero-screen.gif", gif((0, 0), pal, [gif_frame(idx)]))
    put("background-out.gif", gif((w, h), pal[:6], [gif_frame(idx & 1, (1, 1), bits=2)], background=200))
    put("short-palette.gif", gif((w, h), pal[:12], [gif_frame(idx)]))
    put("transparent-out.gif", gif((w, h), pal, [gif_frame(idx, transparent=200)]))
    put("1-bit.gif", gif((w, h), pal[:6], [gif_frame(idx & 1, bits=1)]))
    put("l.gif", saved(art.image("L"), "GIF"))
    put("1.gif", saved(art.image("1"), "GIF"))
    put("p.gif", saved(art.image("P"), "GIF"))
    put("rgba.gif", saved(art.image("RGBA"), "GIF"))
    frames = [art.image("P"), art.image("P").rotate(180)]
    put("animated.gif", saved(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0))
    comment = b"!\xfe\x05hello\0"
    put("comment.gif", gif((w, h), pal, [comment, gif_frame(idx)]))
    whole = gif((w, h), pal, [gif_frame(idx)])
    put("no-trailer.gif", whole[:-1])
    put("cut.gif", whole[: len(whole) * 2 // 3])
    put("no-end-code.gif", whole[:-4] + b"\0;")
    put("trailing.gif", whole + b"more")
    put("no-frame.gif", gif((w, h), pal, []))
    put("few-pixels.gif", gif((w, h), pal, [gif_frame(idx)[:10] + lzw(idx.ravel()[: w * 2], 4)]))
    put("many-pixels.gif", gif((w, h), pal, [gif_frame(idx)[:10] + lzw(np.tile(idx.ravel(), 2), 4)]))
    bad = bytearray(whole)
    bad[len(whole) // 2] ^= 0x55
    put("flipped.gif", bad)


# ---- BMP


def bmp(width, height, bits, rows, palette=b"", compression=0, masks=b"", header=40, colours=0, gap=0, tail=b""):
    """`rows` already padded, in the order of the file; OS/2 where the header has 12 bytes."""
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, abs(height), 1, bits)
    else:
        info = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(rows), 2835, 2835, colours, 0)
        if header > 40:
            info += (masks + bytes(header))[: header - 40]
            masks = b""
        info += masks
    offset = 14 + len(info) + len(palette) + gap
    return struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset) + info + palette + bytes(gap) + rows + tail


def padded(rows, up=True):
    rows = [r + bytes(-len(r) % 4) for r in rows]
    return b"".join(reversed(rows) if up else rows)


def rle8(idx):
    out = bytearray()
    for row in idx[::-1]:
        x, row = 0, [int(v) for v in row]
        while x < len(row):
            run = 1
            while x + run < len(row) and row[x + run] == row[x] and run < 255:
                run += 1
            if run == 1 and len(row) - x >= 4:
                n = min(5, len(row) - x)
                out += bytes([0, n, *row[x : x + n]]) + bytes(n & 1)
                x += n
            else:
                out += bytes([run, row[x]])
                x += run
        out += b"\0\0"
    return bytes(out) + b"\0\1"


def bmps(art):
    w, h, rgb = art.w, art.h, art.rgb
    table = art.rng.randint(0, 256, (256, 3)).astype(np.uint8)
    four = np.hstack([table, np.zeros((256, 1), np.uint8)])
    for bits in (1, 4, 8):
        idx = art.samples(bits, 1)
        rows = packed(idx, bits)
        put(f"{bits}.bmp", bmp(w, h, bits, padded(rows), four[: 1 << bits].tobytes()))
        put(f"{bits}-down.bmp", bmp(w, -h, bits, padded(rows, up=False), four[: 1 << bits].tobytes()))
        put(f"{bits}-os2.bmp", bmp(w, h, bits, padded(rows), table[: 1 << bits].tobytes(), header=12))
        put(f"{bits}-v5.bmp", bmp(w, h, bits, padded(rows), four[: 1 << bits].tobytes(), header=124))
        put(f"{bits}-gap.bmp", bmp(w, h, bits, padded(rows), four[: 1 << bits].tobytes(), gap=7))
        ramp = bytes(v for i in range(1 << bits) for v in (i * 255 // ((1 << bits) - 1),) * 3 + (0,))
        put(f"{bits}-ramp.bmp", bmp(w, h, bits, padded(rows), ramp))
    put("8-few.bmp", bmp(w, h, 8, padded(packed(art.samples(8, 1) // 9, 8)), four[:20].tobytes(), colours=20))
    put("8-too-few.bmp", bmp(w, h, 8, padded(packed(art.samples(8, 1), 8)), four[:20].tobytes(), colours=20))
    put("1-black-first.bmp", bmp(w, h, 1, padded(packed(art.samples(1, 1), 1)), bytes(4) + b"\xff\xff\xff\0"))
    put("1-white-first.bmp", bmp(w, h, 1, padded(packed(art.samples(1, 1), 1)), b"\xff\xff\xff\0" + bytes(4)))
    idx8 = art.grey // 16
    put("rle8.bmp", bmp(w, h, 8, rle8(idx8), four.tobytes(), compression=1))
    put("rle8-cut.bmp", bmp(w, h, 8, rle8(idx8)[: h * 3], four.tobytes(), compression=1))
    put("rle8-delta.bmp", bmp(w, h, 8, bytes([3, 7, 0, 2, 2, 1, 4, 9, 0, 0, 5, 3, 0, 1]), four.tobytes(), compression=1))
    put("rle8-ramp.bmp", bmp(w, h, 8, rle8(idx8), bytes(v for i in range(256) for v in (i, i, i, 0)), compression=1))
    rle4 = b""
    for row in idx8[::-1]:
        r = [int(v) for v in row]
        rle4 += bytes([4, r[0] << 4 | r[1]])
        rest = r[4:]
        if len(rest) >= 3:
            body = bytes((rest[i] << 4) | (rest[i + 1] if i + 1 < len(rest) else 0) for i in range(0, len(rest), 2))
            rle4 += bytes([0, len(rest)]) + body + bytes(len(body) & 1)
        rle4 += b"\0\0"
    put("rle4.bmp", bmp(w, h, 4, rle4 + b"\0\1", four[:16].tobytes(), compression=2))
    put("24.bmp", bmp(w, h, 24, padded(packed(rgb[..., ::-1], 8))))
    put("24-down.bmp", bmp(w, -h, 24, padded(packed(rgb[..., ::-1], 8), up=False)))
    put("24-os2.bmp", bmp(w, h, 24, padded(packed(rgb[..., ::-1], 8)), header=12))
    put("24-cut.bmp", bmp(w, h, 24, padded(packed(rgb[..., ::-1], 8))[: -w * 3]))
    put("24-trailing.bmp", bmp(w, h, 24, padded(packed(rgb[..., ::-1], 8)), tail=b"more" * 5))
    put("os2-64.bmp", bmp(w, h, 24, padded(packed(rgb[..., ::-1], 8)), header=64))
    bgra = np.dstack([rgb[..., ::-1], art.alpha])
    put("32.bmp", bmp(w, h, 32, padded(packed(bgra, 8))))
    put("32-down.bmp", bmp(w, -h, 32, padded(packed(bgra, 8), up=False)))
    m32 = {
        "bgrx": (0xFF0000, 0xFF00, 0xFF, 0),
        "xbgr": (0xFF000000, 0xFF0000, 0xFF00, 0),
        "bgra": (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        "abgr": (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
        "rgba": (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        "zero": (0, 0, 0, 0),
        "odd": (0x3FF, 0xFFC00, 0x3FF00000, 0),
        "bgar": (0xFF000000, 0xFF00, 0xFF, 0xFF0000),
    }
    for name, m in m32.items():
        for header in (40, 56, 124):
            data = bmp(w, h, 32, padded(packed(bgra, 8)), compression=3, masks=struct.pack("<4I", *m), header=header)
            if header == 40:
                data = bmp(w, h, 32, padded(packed(bgra, 8)), compression=3, masks=struct.pack("<3I", *m[:3]))
            put(f"32-{name}-{header}.bmp", data)
    put("32-v5-plain.bmp", bmp(w, h, 32, padded(packed(bgra, 8)), header=124))
    words = art.wide[..., :1]
    rows = padded(packed(words, 16, "<"))
    put("16.bmp", bmp(w, h, 16, rows))
    put("16-down.bmp", bmp(w, -h, 16, padded(packed(words, 16, "<"), up=False)))
    for name, m in {"565": (0xF800, 0x7E0, 0x1F), "555": (0x7C00, 0x3E0, 0x1F), "444": (0xF00, 0xF0, 0xF)}.items():
        put(f"16-{name}.bmp", bmp(w, h, 16, rows, compression=3, masks=struct.pack("<3I", *m)))
    put("24-masks.bmp", bmp(w, h, 24, padded(packed(rgb[..., ::-1], 8)), compression=3, masks=struct.pack("<3I", *m32["bgrx"][:3])))
    put("jpeg-inside.bmp", bmp(w, h, 24, saved(art.image("RGB"), "JPEG"), compression=4))
    put("2-bit.bmp", bmp(w, h, 2, padded(packed(art.samples(2, 1), 2)), four[:4].tobytes()))
    put("header-only.bmp", bmp(w, h, 24, b""))
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        put(f"pillow-{mode}.bmp", saved(art.image(mode), "BMP"))


# ---- TIFF


def tiff(width, height, data, tags, order="<", big=False, pages=1):
    """`data`: strips or tiles; tags: {number: (type, values)}."""
    sizes = {1: "B", 2: "s", 3: "H", 4: "I", 11: "f", 12: "d", 16: "Q", 7: "B"}
    tiles = 322 in tags
    where = {(324 if tiles else 273): None, (325 if tiles else 279): (4, [len(d) for d in data])}
    tags = {256: (4, [width]), 257: (4, [height]), **tags, **where}
    count = len(tags)
    head = 16 if big else 8
    entry, inline, fmt = (20, 8, "Q") if big else (12, 4, "I")
    ifd_size = (8 if big else 2) + count * entry + inline
    position = head + ifd_size
    body = b""
    offsets = []
    for d in data:
        offsets.append(position + len(body))
        body += d + bytes(len(d) % 2)
    tags[324 if tiles else 273] = (4, offsets)
    entries = b""
    for tag in sorted(tags):
        kind, values = tags[tag]
        raw = bytes(values) if kind in (2, 7) else struct.pack(f"{order}{len(values)}{sizes[kind]}", *values)
        entries += struct.pack(f"{order}HH{fmt}", tag, kind, len(values))
        if len(raw) <= inline:
            entries += raw + bytes(inline - len(raw))
        else:
            entries += struct.pack(order + fmt, position + len(body))
            body += raw + bytes(len(raw) % 2)
    mark = b"II" if order == "<" else b"MM"
    start = struct.pack(f"{order}HHHQ", 43, 8, 0, head) if big else struct.pack(f"{order}HI", 42, head)
    return mark + start + struct.pack(order + ("Q" if big else "H"), count) + entries + bytes(inline) + body


def plain_tags(photometric, bits, samples, compression=1, extra=None, planar=1, **more):
    tags = {
        258: (3, [bits] * samples),
        259: (3, [compression]),
        262: (3, [photometric]),
        277: (3, [samples]),
        284: (3, [planar]),
    }
    if extra is not None:
        tags[338] = (3, extra)
    return tags | {int(k[1:]): v for k, v in more.items()}


def strips(rows, per):
    return [b"".join(rows[i : i + per]) for i in range(0, len(rows), per)]


def tiffs(art):
    w, h, rgb = art.w, art.h, art.rgb
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "YCbCr", "LAB", "I;16", "F", "I"):
        put(f"pillow-{mode.replace(';', '')}.tif", saved(art.image(mode), "TIFF"))
    for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"):
        for mode in ("RGB", "L", "P", "CMYK", "RGBA", "I;16"):
            try:
                put(f"{c}-{mode.replace(';', '')}.tif", saved(art.image(mode), "TIFF", compression=c))
            except OSError:
                continue
    for c in ("group3", "group4", "tiff_ccitt", "tiff_lzw", "packbits"):
        put(f"{c}-1.tif", saved(art.image("1"), "TIFF", compression=c))
    put("predictor.tif", saved(art.image("RGB"), "TIFF", compression="tiff_lzw", tiffinfo={317: 2}))
    put("predictor-l.tif", saved(art.image("L"), "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2}))
    put("jpeg.tif", saved(art.image("RGB"), "TIFF", compression="jpeg"))
    put("jpeg-l.tif", saved(art.image("L"), "TIFF", compression="jpeg"))
    put("jpeg-cmyk.tif", saved(art.image("CMYK"), "TIFF", compression="jpeg"))
    put("jpeg-ycc.tif", saved(art.image("YCbCr"), "TIFF", compression="jpeg"))
    for o in range(1, 9):
        put(f"orientation-{o}.tif", saved(art.image("RGB"), "TIFF", tiffinfo={274: o}))
    put("orientation-6-lzw.tif", saved(art.image("L"), "TIFF", tiffinfo={274: 6}, compression="tiff_lzw"))
    put("orientation-3-cmyk.tif", saved(art.image("CMYK"), "TIFF", tiffinfo={274: 3}))
    put("orientation-9.tif", saved(art.image("RGB"), "TIFF", tiffinfo={274: 9}))
    put("pages.tif", saved(art.image("RGB"), "TIFF", save_all=True, append_images=[art.image("L")]))
    put("big.tif", saved(art.image("RGB"), "TIFF", big_tiff=True))
    put("thumbnail-first.tif", saved(art.image("L").resize((5, 4)), "TIFF", save_all=True, append_images=[art.image("RGB")]))
    for order in "<>":
        name = "le" if order == "<" else "be"
        for big in (False, True):
            rows = strips(packed(rgb, 8), 4)
            put(f"rgb-{name}{'-big' if big else ''}.tif", tiff(w, h, rows, plain_tags(2, 8, 3, _278=(4, [4])), order, big))
        for photometric in (0, 1):
            for bits in (1, 2, 4, 8, 16):
                rows = strips(packed(art.samples(bits, 1), bits, order), 5)
                tags = plain_tags(photometric, bits, 1, _278=(4, [5]))
                put(f"grey{bits}-p{photometric}-{name}.tif", tiff(w, h, rows, tags, order))
        rows = packed(art.low[..., None], 16, order)
        put(f"grey16-low-{name}.tif", tiff(w, h, strips(rows, h), plain_tags(1, 16, 1, _278=(4, [h])), order))
        rows = packed(art.low[..., None], 16, order)
        put(f"int16-{name}.tif", tiff(w, h, strips(rows, h), plain_tags(1, 16, 1, _278=(4, [h]), _339=(3, [2])), order))
        for c in (3, 4):
            rows = strips(packed(art.samples(16, c), 16, order), 3)
            tags = plain_tags(2, 16, c, extra=[2] if c == 4 else None, _278=(4, [3]))
            put(f"rgb16-{c}-{name}.tif", tiff(w, h, rows, tags, order))
        f = (art.wide[..., 0] / 200 - 20).astype(order + "f4")
        put(f"float-{name}.tif", tiff(w, h, [f.tobytes()], plain_tags(1, 32, 1, _339=(3, [3]), _278=(4, [h])), order))
        i = (art.low.astype(np.int32) - 100).astype(order + "i4")
        put(f"int32-{name}.tif", tiff(w, h, [i.tobytes()], plain_tags(1, 32, 1, _339=(3, [2]), _278=(4, [h])), order))
        put(f"uint32-{name}.tif", tiff(w, h, [i.tobytes()], plain_tags(1, 32, 1, _339=(3, [1]), _278=(4, [h])), order))
        for bits in (1, 2, 4, 8):
            colours = art.rng.randint(0, 65536, 3 << bits)
            tags = plain_tags(3, bits, 1, _320=(3, [int(v) for v in colours]), _278=(4, [h]))
            put(f"palette{bits}-{name}.tif", tiff(w, h, strips(packed(art.samples(bits, 1), bits), h), tags, order))
    four = art.samples(8, 4)
    for extra in ([0], [1], [2], None):
        tags = plain_tags(2, 8, 4, extra=extra, _278=(4, [h]))
        put(f"rgb-extra-{extra and extra[0]}.tif", tiff(w, h, [b"".join(packed(four, 8))], tags))
        tags = plain_tags(1, 8, 2, extra=extra, _278=(4, [h]))
        put(f"grey-extra-{extra and extra[0]}.tif", tiff(w, h, [b"".join(packed(art.samples(8, 2), 8))], tags))
    five = np.dstack([four, art.grey])
    put("rgb-5.tif", tiff(w, h, [b"".join(packed(five, 8))], plain_tags(2, 8, 5, extra=[2, 0], _278=(4, [h]))))
    put("rgb-5-00.tif", tiff(w, h, [b"".join(packed(five, 8))], plain_tags(2, 8, 5, extra=[0, 0], _278=(4, [h]))))
    put("cmyk-5.tif", tiff(w, h, [b"".join(packed(five, 8))], plain_tags(5, 8, 5, extra=[0], _278=(4, [h]))))
    put("cmyk.tif", tiff(w, h, [b"".join(packed(four, 8))], plain_tags(5, 8, 4, _278=(4, [h]))))
    put("cmyk16.tif", tiff(w, h, [b"".join(packed(art.samples(16, 4), 16, "<"))], plain_tags(5, 16, 4, _278=(4, [h]))))
    put("lab.tif", tiff(w, h, [b"".join(packed(rgb, 8))], plain_tags(8, 8, 3, _278=(4, [h]))))
    put("icclab.tif", tiff(w, h, [b"".join(packed(rgb, 8))], plain_tags(9, 8, 3, _278=(4, [h]))))
    put("ycc.tif", tiff(w, h, [b"".join(packed(rgb, 8))], plain_tags(6, 8, 3, _278=(4, [h]), _530=(3, [1, 1]))))
    sub = b"".join(packed(np.resize(rgb, ((h + 1) // 2, (w + 1) // 2, 6)), 8))
    put("ycc-22.tif", tiff(w, h, [sub], plain_tags(6, 8, 3, _278=(4, [h]), _530=(3, [2, 2]))))
    for c, mode in ((3, 2), (4, 5), (1, 1)):
        planes = [b"".join(packed(four[..., k : k + 1], 8)) for k in range(c)]
        put(f"planar-{c}.tif", tiff(w, h, planes, plain_tags(mode, 8, c, planar=2, _278=(4, [h]))))
    planes = [zlib.compress(p) for p in [b"".join(packed(four[..., k : k + 1], 8)) for k in range(3)]]
    put("planar-deflate.tif", tiff(w, h, planes, plain_tags(2, 8, 3, 8, planar=2, _278=(4, [h]))))
    planes = [b"".join(packed(art.wide[..., k : k + 1], 16, "<")) for k in range(3)]
    put("planar-16.tif", tiff(w, h, planes, plain_tags(2, 16, 3, planar=2, _278=(4, [h]))))
    for name, full, photometric, c in (("rgb", rgb, 2, 3), ("grey", art.grey[..., None], 1, 1), ("cmyk", four, 5, 4)):
        pad = np.pad(full, ((0, -h % 16), (0, -w % 16), (0, 0)))
        tiles = [
            b"".join(packed(pad[y : y + 16, x : x + 16], 8)) for y in range(0, h, 16) for x in range(0, w, 16)
        ]
        tags = {322: (3, [16]), 323: (3, [16])}
        put(f"tiles-{name}.tif", tiff(w, h, tiles, plain_tags(photometric, 8, c) | tags))
        put(f"tiles-{name}-deflate.tif", tiff(w, h, [zlib.compress(t) for t in tiles], plain_tags(photometric, 8, c, 8) | tags))
    one = packed(art.samples(1, 1), 1)
    put("fillorder.tif", tiff(w, h, [b"".join(one)], plain_tags(1, 1, 1, _266=(3, [2]), _278=(4, [h]))))
    put("fillorder-8.tif", tiff(w, h, [b"".join(packed(rgb, 8))], plain_tags(2, 8, 3, _266=(3, [2]), _278=(4, [h]))))
    put("bits-12.tif", tiff(w, h, [bytes(h * ((w * 12 + 7) // 8))], plain_tags(1, 12, 1, _278=(4, [h]))))
    put("double.tif", tiff(w, h, [(art.wide[..., 0] / 200.0).astype("<f8").tobytes()], plain_tags(1, 64, 1, _339=(3, [3]), _278=(4, [h]))))
    put("int8.tif", tiff(w, h, [b"".join(packed(art.samples(8, 1), 8))], plain_tags(1, 8, 1, _339=(3, [2]), _278=(4, [h]))))
    whole = saved(art.image("RGB"), "TIFF", compression="tiff_lzw")
    put("cut.tif", tiff(w, h, [b"".join(packed(rgb, 8))], plain_tags(2, 8, 3, _278=(4, [h])))[: -w * 3])
    put("cut-lzw.tif", tiff(w, h, [zlib.compress(b"".join(packed(rgb, 8)))], plain_tags(2, 8, 3, 8, _278=(4, [h])))[:-40])
    bad = bytearray(whole)
    bad[60] ^= 0x3C
    put("flipped-lzw.tif", bad)
    put("ifd-outside.tif", b"II*\0\xff\xff\xff\0" + bytes(40))


# ---- WebP, AVIF, the PPM family, and what is not read


def webps(art):
    rgb, rgba = art.image("RGB"), art.image("RGBA")
    put("lossy.webp", saved(rgb, "WEBP", quality=70))
    put("lossy-alpha.webp", saved(rgba, "WEBP", quality=70))
    put("lossy-alpha-100.webp", saved(rgba, "WEBP", quality=90, alpha_quality=100, exact=True))
    put("lossless.webp", saved(rgb, "WEBP", lossless=True))
    put("lossless-alpha.webp", saved(rgba, "WEBP", lossless=True))
    put("lossless-exact.webp", saved(rgba, "WEBP", lossless=True, exact=True))
    put("grey.webp", saved(art.image("L"), "WEBP"))
    for name, base in (("rgb", rgb), ("rgba", rgba)):
        put(f"animated-{name}.webp", saved(base, "WEBP", save_all=True, append_images=[base.rotate(180)], lossless=True, exact=True))
        put(f"animated-lossy-{name}.webp", saved(base, "WEBP", save_all=True, append_images=[base.rotate(180)], quality=60))
    exif = Image.Exif()
    exif[0x0112] = 6
    put("exif.webp", saved(rgb, "WEBP", exif=exif))
    whole = saved(rgb, "WEBP", lossless=True)
    put("cut.webp", whole[: len(whole) * 2 // 3])
    put("cut-lossy.webp", saved(rgb, "WEBP")[:-30])
    put("trailing.webp", whole + b"more")


def avifs(art):
    rgb, rgba = art.image("RGB"), art.image("RGBA")
    for s in ("4:4:4", "4:2:2", "4:2:0"):
        put(f"{s.replace(':', '')}.avif", saved(rgb, "AVIF", subsampling=s, quality=80))
    put("grey.avif", saved(art.image("L"), "AVIF"))
    put("400.avif", saved(rgb, "AVIF", subsampling="4:0:0"))
    put("alpha.avif", saved(rgba, "AVIF", quality=80))
    put("limited.avif", saved(rgb, "AVIF", range="limited"))
    put("animated.avif", saved(rgb, "AVIF", save_all=True, append_images=[rgb.rotate(180)]))
    exif = Image.Exif()
    exif[0x0112] = 6
    put("exif.avif", saved(rgb, "AVIF", exif=exif))
    put("cut.avif", saved(rgb, "AVIF")[:-60])


def pnms(art):
    for mode, ext in (("1", "pbm"), ("L", "pgm"), ("RGB", "ppm")):
        put(f"raw.{ext}", saved(art.image(mode), "PPM"))
    w, h = art.w, art.h
    put("16.pgm", b"P5\n%d %d\n65535\n" % (w, h) + b"".join(packed(art.wide[..., :1], 16)))
    put("16.ppm", b"P6\n%d %d\n65535\n" % (w, h) + b"".join(packed(art.wide, 16)))
    put("max100.pgm", b"P5 # hello\n%d %d\n100\n" % (w, h) + (art.grey // 3).tobytes())
    put("max100.ppm", b"P6 %d %d 100\n" % (w, h) + (art.rgb // 3).tobytes())
    put("plain.pgm", b"P2\n%d %d\n255\n" % (w, h) + b" ".join(b"%d" % v for v in art.grey.ravel()) + b"\n")
    put("plain.ppm", b"P3\n%d %d\n255\n" % (w, h) + b" ".join(b"%d" % v for v in art.rgb.ravel()) + b"\n")
    put("plain.pbm", b"P1\n%d %d\n" % (w, h) + b" ".join(b"%d" % (v > 128) for v in art.grey.ravel()) + b"\n")
    put("cut.ppm", saved(art.image("RGB"), "PPM")[:-20])
    put("float.pfm", saved(art.image("F"), "PPM"))


def others(art):
    """Formats that aligngpt refuses by name; Pillow reads some."""
    rgb = art.image("RGB")
    put("x.jp2", saved(rgb, "JPEG2000"))
    put("x.j2k", saved(rgb, "JPEG2000", no_jp2=True))
    put("x.ico", saved(rgb, "ICO"))
    put("x.icns", b"icns" + bytes(50))
    put("x.tga", saved(rgb, "TGA"))
    put("x.pcx", saved(rgb, "PCX"))
    put("x.dds", saved(rgb, "DDS"))
    put("x.sgi", saved(rgb, "SGI"))
    put("x.qoi", saved(rgb, "QOI"))
    put("x.pdf", saved(rgb, "PDF"))
    put("x.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    put("x.eps", saved(rgb, "EPS"))
    ftyp = lambda brand: struct.pack(">I4s4sI4s4s", 24, b"ftyp", brand, 0, b"mif1", brand) + bytes(60)
    put("x.heic", ftyp(b"heic"))
    put("x.jxl", b"\xff\x0a" + bytes(50))
    put("container.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50))
    put("x.psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(50))


def expectation(data, keep=None):
    """What Pillow makes of it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, format = image.mode, image.format
            rgb = image.convert("RGB")
        raw = rgb.tobytes()
        if keep:
            keep.write_bytes(raw)
        found = {"size": list(rgb.size), "mode": mode, "sha256": hashlib.sha256(raw).hexdigest()}
        # of AVIF the decoders differ, so the numbers themselves are needed
        return found | ({"rgb": base64.b64encode(raw).decode()} if format == "AVIF" else {})
    except Exception as e:  # Pillow raises what its plugins raise
        return {"error": re.sub(r" <_io.*>", "", f"{type(e).__name__}: {e}")[:150]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, nargs=2, default=(13, 9))
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="files made by other programs")
    parser.add_argument("--raw", action="store_true", help="also what Pillow decodes, as NAME.rgb")
    a = parser.parse_args()
    art = Art(*a.side)
    for make in (pngs, jpegs, gifs, bmps, tiffs, webps, avifs, pnms, others):
        make(art)
    for file in a.also:
        put(file.name, file.read_bytes())
    a.out.mkdir(parents=True, exist_ok=True)
    table = {}
    for name, data in sorted(FILES.items()):
        (a.out / name).write_bytes(data)
        table[name] = expectation(data, a.out / f"{name}.rgb" if a.raw else None)
    (a.out / "pictures.json").write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table.items()) + "\n}\n")
    print(len(table), "pictures,", sum(map(len, FILES.values())), "bytes", file=sys.stderr)


main()
