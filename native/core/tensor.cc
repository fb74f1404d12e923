#include "tensor.h"

#include <algorithm>

namespace ag {

Storage::Storage(Device* device, int64_t bytes, bool ahead) : device(device), bytes(bytes) {
  p = device->allocate(bytes, &actual, ahead);
}
Storage::~Storage() { device->memory.release(p, actual); }

void Storage::written() {
  packed.clear();
  mirror_stale = true;
  version++;
}

// ---- tensor -----------------------------------------------------------------------------------------
Tensor Tensor::detached() const {
  Tensor t = *this;
  t.var = nullptr;
  t.again = nullptr;
  return t;
}

Tensor Tensor::view(const Shape& s) const {
  check(s.numel() == numel(), "ERR_SHAPE", "[reshape] expected ", numel(), " elements, got shape ", s);
  Tensor t = detached();
  t.shape = s;
  return t;
}

const void* Tensor::packed(int64_t rows, int64_t cols, bool trans_b) const {
  for (const Packed& p : storage->packed)
    if (p.offset == offset && p.dt == dt && p.rows == rows && p.cols == cols && p.trans_b == trans_b) return p.blob->p;
  return nullptr;
}

Tensor empty(Device* device, const Shape& shape, AgDtype dt) {
  Tensor t;
  t.shape = shape;
  t.dt = dt;
  t.storage = std::make_shared<Storage>(device, shape.numel() * dtype_size(dt));
  return t;
}

Tensor zeros(Device* device, const Shape& shape, AgDtype dt) {
  Tensor t = empty(device, shape, dt);
  run("zeros", device, &AgBackend::fill, AgFill{t.data(), dt, t.numel(), 0.0});
  return t;
}

void refresh_mirror(Storage& s) {
  if (!s.mirror_stale) return;
  copy_bytes(s.mirror->device, s.mirror->p, s.p, s.bytes);
  s.mirror_stale = false;
}
void* mirror_of(const std::shared_ptr<Storage>& storage, Device* device) {
  auto turn = device->turn();
  Storage& s = *storage;
  if (!s.mirror || s.mirror->device != device) {
    s.mirror = std::make_shared<Storage>(device, s.bytes, true);
    s.mirror_stale = true;
  }
  if (device->recording) {
    auto& indices = device->recording->indices;
    if (std::find(indices.begin(), indices.end(), storage) == indices.end()) indices.push_back(storage);
  } else {
    refresh_mirror(s);
  }
  return s.mirror->p;
}

}  // namespace ag
