// Reverse-mode differentiation. An op records a node: what it must be told (gradients of its outputs), whom it
// tells (its inputs' Vars) and a closure that does it. Nodes are owned by the tensors they made, so a forward pass
// that is never differentiated disappears with its tensors; a saved tensor dies as soon as backward has used it.
#pragma once
#include <functional>

#include "tensor.h"

namespace ag {

struct Node;

// The gradient side of a tensor. It does not keep the tensor's values alive.
struct Var {
  std::shared_ptr<Node> node;  // who made the tensor; null for a leaf
  int output = 0;              // which of the node's outputs
  Shape shape;
  AgDtype dt = AG_F32;
  Device* device = nullptr;
  Tensor grad;         // accumulated so far
  bool stale = false;  // leaf: grad is a buffer whose content no longer counts (zero_grad); the next write overwrites
};

// What a backward closure sees.
struct Grads {
  Node* node;
  const Tensor& out(int i = 0) const;  // gradient of output i (zeros when nothing flowed into it)
  bool needs(int input) const;
  void add(int input, Tensor g);  // accumulates; g may be shared with others
  AgGrad slot(int input);         // for kernels that write or accumulate by themselves; p is null if not needed
};

using Backward = std::function<void(Grads&)>;

struct Node {
  const char* op;
  uint64_t sequence;
  bool done = false;
  std::vector<std::shared_ptr<Var>> inputs;  // null: no gradient wanted
  std::vector<std::weak_ptr<Var>> outputs;
  std::vector<Tensor> out_grads;  // filled while backward runs
  Backward backward;
  ~Node();
};

bool grad_enabled();  // per thread
bool set_grad_enabled(bool on);

bool wants_grad(const Tensor& t);
// True when recording would do something: gradients are on and some input wants one.
bool recording(std::initializer_list<const Tensor*> inputs);
bool recording(const std::vector<Tensor>& inputs);

// A tensor that costs little to compute from what its own node keeps anyway (a norm's output: from the norm's input).
struct Again {
  std::function<Tensor()> make;
  Tensor value;  // while closures that want it are left
};
// What a closure keeps of a tensor: its values, or the way to compute them again, once for all closures that want them.
// Values that were written into meanwhile are refused (PyTorch's version counters): the gradient would be that of
// something else.
class Saved {
 public:
  Saved() = default;
  explicit Saved(const Tensor& t) : again_(t.again) {
    if (again_ || !t.defined()) return;
    values_ = t.detached();
    version_ = t.storage->version;
  }
  Tensor get() const;  // throws ERR_AUTOGRAD

 private:
  Tensor values_;
  int64_t version_ = 0;
  std::shared_ptr<Again> again_;
};

// Makes the outputs differentiable. Closures must save tensors as Saved; those that nobody else has may be saved as
// they are.
void record(const char* op, std::initializer_list<Tensor*> outputs, const std::vector<Tensor>& inputs, Backward fn);

void set_requires_grad(Tensor& t, bool on);
// Runs backward from `root`; `seed` is its gradient (default: 1 for a single element).
void backward(const Tensor& root, const Tensor& seed);

Tensor grad_of(const Tensor& leaf);  // undefined when there is none; zeros when stale
void set_grad(const Tensor& leaf,
              const Tensor& buffer);  // gradients accumulate into this buffer (f32 or the leaf's dtype)
void zero_grad(const Tensor& leaf);

}  // namespace ag
