#include "file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ag {

namespace {

std::atomic<int64_t> calls{0}, first_failing{-1}, last_failing{-1};
std::atomic<bool> failing_kills{false};

struct File {
  std::FILE* f;
  const std::string& path;
  File(const std::string& path, const char* mode) : f((file_call(path), std::fopen(path.c_str(), mode))), path(path) {
    if (!f) fail("ERR_FILE", "[file] ", path, ": cannot open (", std::strerror(errno), ")");
  }
  ~File() {
    if (f) std::fclose(f);
  }
  void seek(int64_t offset) {
    file_call(path);
#ifdef _WIN32
    int rc = _fseeki64(f, offset, SEEK_SET);
#else
    int rc = fseeko(f, off_t(offset), SEEK_SET);
#endif
    if (rc) fail("ERR_FILE", "[file] ", path, ": cannot seek to ", offset, " (", std::strerror(errno), ")");
  }
  void read(void* p, int64_t bytes) {
    file_call(path);
    size_t got = std::fread(p, 1, size_t(bytes), f);
    if (int64_t(got) != bytes) fail("ERR_FILE", "[file] ", path, ": expected ", bytes, " more bytes, got ", got);
  }
  void write(const void* p, int64_t bytes) {
    file_call(path);
    if (int64_t(std::fwrite(p, 1, size_t(bytes), f)) != bytes)
      fail("ERR_FILE", "[file] ", path, ": write failed (", std::strerror(errno), ")");
  }
  void close() {
    file_call(path);
    int rc = std::fclose(f);
    f = nullptr;
    if (rc) fail("ERR_FILE", "[file] ", path, ": write failed (", std::strerror(errno), ")");
  }
};

// IEEE half to float; exact.
float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    float v = float(fraction) * 5.9604644775390625e-8f;
    return sign ? -v : v;
  }
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

constexpr int64_t kChunk = 1 << 20;  // elements converted at a time

}  // namespace

int64_t file_calls() { return calls; }

void file_call(const std::string& path) {
  const int64_t n = calls++;
  if (n < first_failing || n > last_failing || first_failing < 0) return;
  if (failing_kills) {
#ifdef SIGKILL
    std::raise(SIGKILL);
#endif
    std::_Exit(137);
  }
  fail("ERR_FILE", "[file] ", path, ": ", std::strerror(ENOSPC), " (test hook)");
}

void fail_files(int64_t after, int64_t count, bool kill) {
  check(count >= 1, "ERR_ARGUMENT", "[failFiles] count: expected >= 1, got ", count);
  failing_kills = kill;
  last_failing = calls + after + count - 1;
  first_failing = after < 0 ? -1 : calls + after;
}

void read_file(const Tensor& t, const std::string& path, int64_t offset, const std::string& dtype) {
  check(offset >= 0, "ERR_ARGUMENT", "[readFile] offset: expected >= 0, got ", offset);
  bool half = dtype == "f16";
  AgDtype from = half ? AG_F32 : parse_dtype(dtype);
  check(is_float(from) == is_float(t.dt), "ERR_DTYPE", "[readFile] ", path, ": expected ", dtype_name(t.dt), ", got ",
        dtype);
  File file(path, "rb");
  file.seek(offset);
  int64_t n = t.numel(), chunk = std::min(n, kChunk);
  Device* device = t.device();
  t.storage->written();
  if (!half && from == t.dt && device == &cpu()) return file.read(t.data(), t.bytes());
  Tensor staged = empty(&cpu(), Shape{chunk}, from);
  std::vector<uint16_t> halves(half ? chunk : 0);
  for (int64_t at = 0; at < n; at += chunk) {
    int64_t m = std::min(chunk, n - at);
    if (half) {
      file.read(halves.data(), m * 2);
      for (int64_t i = 0; i < m; i++) staged.as<float>()[i] = half_to_float(halves[i]);
    } else {
      file.read(staged.data(), m * dtype_size(from));
    }
    Tensor piece = staged;  // as it is where nothing is converted: not every bit pattern is a number
    if (half || from != t.dt) {
      piece = empty(&cpu(), Shape{m}, t.dt);
      run("readFile", &cpu(), &AgBackend::cast, AgCast{piece.data(), t.dt, staged.data(), from, m});
    }
    copy_bytes(device, t.as<char>() + at * dtype_size(t.dt), piece.data(), m * dtype_size(t.dt));
  }
}

void write_file(const Tensor& t, const std::string& path, int64_t offset) {
  check(offset >= 0, "ERR_ARGUMENT", "[writeFile] offset: expected >= 0, got ", offset);
  {
    File make(path, "ab");  // creates the file without touching what it holds
  }
  File file(path, "r+b");
  file.seek(offset);
  Device* device = t.device();
  if (device == &cpu()) {
    file.write(t.data(), t.bytes());
  } else {
    const int64_t size = dtype_size(t.dt), chunk = std::min(t.numel(), kChunk);
    Tensor staged = empty(&cpu(), Shape{chunk}, t.dt);
    for (int64_t at = 0; at < t.numel(); at += chunk) {
      const int64_t m = std::min(chunk, t.numel() - at);
      copy_bytes(device, staged.data(), t.as<char>() + at * size, m * size);
      synchronize(device);
      file.write(staged.data(), m * size);
    }
  }
  file.close();
}

}  // namespace ag
