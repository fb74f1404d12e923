// Tensors: a dtype, a shape and a piece of shared storage on one device. Always contiguous, row major.
//
// Storage is process-wide with atomic counts; everything that refers to it (handles, tape) belongs to one thread.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "device.h"
#include "shape.h"

namespace ag {

// A matrix [rows, cols] once more, in the layout the backend's products want it as right-hand side (AgPack). It belongs
// to the storage of its values: it goes with them, and is dropped when somebody writes into them.
struct Packed {
  int64_t offset;
  AgDtype dt;
  int64_t rows, cols;
  bool trans_b;
  std::shared_ptr<Storage> blob;
};

struct Storage {
  Device* device;
  void* p = nullptr;
  int64_t bytes = 0;   // asked for
  int64_t actual = 0;  // got
  std::vector<Packed> packed;
  // The same bytes on another device, for indices, which ops check and keep on the CPU (device_i32). Its memory stays
  // when it is stale, so that what was captured with it finds the new values.
  std::shared_ptr<Storage> mirror;
  bool mirror_stale = false;
  int64_t version = 0;  // how often it was written into: what the tape kept of it must have the same (Saved in tape.h)
  void written();       // whoever writes into it says so
  Storage(Device* device, int64_t bytes, bool ahead = false);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
};

// ---- tensor -----------------------------------------------------------------------------------------
struct Var;    // the tape's view of a tensor (tape.h)
struct Again;  // how to compute a tensor again (tape.h)

struct Tensor {
  std::shared_ptr<Storage> storage;
  int64_t offset = 0;  // bytes
  AgDtype dt = AG_F32;
  Shape shape;
  std::shared_ptr<Var> var;      // null: no gradient wanted
  std::shared_ptr<Again> again;  // null: backward must keep the values

  bool defined() const { return storage != nullptr; }
  Device* device() const { return storage->device; }
  void* data() const { return static_cast<char*>(storage->p) + offset; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  int64_t numel() const { return shape.numel(); }
  int64_t bytes() const { return numel() * dtype_size(dt); }
  const void* packed(int64_t rows, int64_t cols, bool trans_b) const;  // the blob of `pack` for this matrix, or null
  Tensor detached() const;                // same storage, no tape and no way to compute it again
  Tensor view(const Shape& shape) const;  // same storage and number of elements, no tape
};

// The storage's bytes on another device: brought when they changed, or, while a graph is being recorded, by its launch.
void* mirror_of(const std::shared_ptr<Storage>& storage, Device* device);
void refresh_mirror(Storage& storage);

Tensor empty(Device* device, const Shape& shape, AgDtype dt);
inline Tensor empty_like(const Tensor& x) { return empty(x.device(), x.shape, x.dt); }
Tensor zeros(Device* device, const Shape& shape, AgDtype dt);

}  // namespace ag
