#include "tape.h"

#include <algorithm>
#include <queue>
#include <unordered_map>

namespace ag {

static thread_local bool t_grad_enabled = true;
static thread_local uint64_t t_sequence = 0;
static thread_local const char* t_running = "";  // the op whose closure runs

bool grad_enabled() { return t_grad_enabled; }
bool set_grad_enabled(bool on) {
  bool before = t_grad_enabled;
  t_grad_enabled = on;
  return before;
}

// A chain of thousands of nodes must not be destroyed recursively: inputs are handed to a work list.
Node::~Node() {
  static thread_local std::vector<std::shared_ptr<Var>>* pending = nullptr;
  if (pending) {
    for (auto& v : inputs) pending->push_back(std::move(v));
    return;
  }
  std::vector<std::shared_ptr<Var>> list = std::move(inputs);
  pending = &list;
  while (!list.empty()) {
    std::shared_ptr<Var> v = std::move(list.back());
    list.pop_back();
    v.reset();
  }
  pending = nullptr;
}

Tensor Saved::get() const {
  if (again_) {
    if (!again_->value.defined()) again_->value = again_->make();
    return again_->value;
  }
  check(!values_.defined() || values_.storage->version == version_, "ERR_AUTOGRAD", "[backward] ", t_running,
        ": a tensor ", values_.shape, " it keeps, expected as in the forward pass, got it written into since");
  return values_;
}

bool wants_grad(const Tensor& t) { return t.defined() && t.var != nullptr; }

bool recording(std::initializer_list<const Tensor*> inputs) {
  if (!t_grad_enabled) return false;
  return std::any_of(inputs.begin(), inputs.end(), [](const Tensor* t) { return wants_grad(*t); });
}
bool recording(const std::vector<Tensor>& inputs) {
  return t_grad_enabled && std::any_of(inputs.begin(), inputs.end(), wants_grad);
}

void record(const char* op, std::initializer_list<Tensor*> outputs, const std::vector<Tensor>& inputs, Backward fn) {
  if (!recording(inputs)) return;
  auto node = std::make_shared<Node>();
  node->op = op;
  node->sequence = ++t_sequence;
  node->backward = std::move(fn);
  for (const Tensor& t : inputs) node->inputs.push_back(t.defined() ? t.var : nullptr);
  int i = 0;
  for (Tensor* t : outputs) {
    auto var = std::make_shared<Var>();
    var->node = node;
    var->output = i++;
    var->shape = t->shape;
    var->dt = t->dt;
    var->device = t->device();
    node->outputs.push_back(var);
    t->var = std::move(var);
  }
  node->out_grads.resize(node->outputs.size());
}

void set_requires_grad(Tensor& t, bool on) {
  if (!on) {
    t.var = nullptr;
    return;
  }
  check(is_float(t.dt), "ERR_DTYPE", "[requiresGrad] dtype: expected a float tensor, got ", dtype_name(t.dt));
  if (t.var && t.var->node) fail("ERR_AUTOGRAD", "[requiresGrad] expected a leaf, got the result of ", t.var->node->op);
  if (t.var) return;
  t.storage->packed.clear();  // it is going to change
  t.var = std::make_shared<Var>();
  t.var->shape = t.shape;
  t.var->dt = t.dt;
  t.var->device = t.device();
}

// ---- accumulation -----------------------------------------------------------------------------------
static Tensor cast_to(const Tensor& x, AgDtype dt) {
  if (x.dt == dt) return x;
  Tensor y = empty(x.device(), x.shape, dt);
  run("cast", x.device(), &AgBackend::cast, AgCast{y.data(), dt, x.data(), x.dt, x.numel()});
  return y;
}

static void add_into(Tensor& dst, const Tensor& a, const Tensor& b) {
  run("add", dst.device(), &AgBackend::binary,
      AgBinary{AG_ADD, dst.data(), a.data(), b.data(), dst.numel(), dst.numel(), dst.dt});
}

// A leaf's first gradient may share storage with another tensor's: own it before it is kept.
static void own_leaf_grad(Var& v) {
  if (v.node || !v.grad.defined() || v.grad.storage.use_count() == 1) return;
  Tensor copy = empty(v.device, v.shape, v.grad.dt);
  copy_bytes(v.device, copy.data(), v.grad.data(), copy.bytes());
  v.grad = copy;
}

static void accumulate(Var& v, Tensor g) {
  check(g.shape == v.shape, "ERR_SHAPE", "[backward] gradient shape: expected ", v.shape, ", got ", g.shape);
  g.var = nullptr;
  if (!v.grad.defined()) {
    v.grad = g.dt == v.dt ? std::move(g) : cast_to(g, v.dt);
    g = Tensor();
    own_leaf_grad(v);
  } else if (v.stale) {  // a leaf's own buffer
    v.grad.storage->written();
    run("cast", v.device, &AgBackend::cast, AgCast{v.grad.data(), v.grad.dt, g.data(), g.dt, g.numel()});
    v.stale = false;
  } else if (v.node == nullptr || v.grad.storage.use_count() == 1) {
    v.grad.storage->written();
    add_into(v.grad, v.grad, cast_to(g, v.grad.dt));
  } else {  // the storage is someone else's gradient too: do not write into it
    Tensor sum = empty(v.device, v.shape, v.grad.dt);
    add_into(sum, v.grad, cast_to(g, v.grad.dt));
    v.grad = sum;
  }
}

const Tensor& Grads::out(int i) const {
  Tensor& g = node->out_grads[i];
  if (!g.defined()) {
    auto v = node->outputs[i].lock();
    check(v != nullptr, "ERR_AUTOGRAD", "[backward] ", node->op, ": output ", i, " has no gradient");
    g = zeros(v->device, v->shape, v->dt);
  }
  return g;
}

bool Grads::needs(int input) const { return node->inputs[input] != nullptr; }

void Grads::add(int input, Tensor g) {
  if (Var* v = node->inputs[input].get()) accumulate(*v, std::move(g));
}

AgGrad Grads::slot(int input) {
  Var* v = node->inputs[input].get();
  if (!v) return AgGrad{nullptr, AG_F32, 0};
  if (!v->grad.defined()) {
    v->grad = empty(v->device, v->shape, v->dt);
    return AgGrad{v->grad.data(), v->grad.dt, 0};
  }
  if (v->node && v->grad.storage.use_count() > 1) {
    Tensor copy = empty(v->device, v->shape, v->grad.dt);
    copy_bytes(v->device, copy.data(), v->grad.data(), copy.bytes());
    v->grad = copy;
  }
  v->grad.storage->written();  // a buffer may be anyone's
  bool fresh = v->stale;
  v->stale = false;
  return AgGrad{v->grad.data(), v->grad.dt, fresh ? 0 : 1};
}

// ---- backward ---------------------------------------------------------------------------------------
struct BySequence {
  bool operator()(const std::shared_ptr<Node>& a, const std::shared_ptr<Node>& b) const {
    return a->sequence < b->sequence;
  }
};

static void run_node(Node& node) {
  check(!node.done, "ERR_AUTOGRAD", "[backward] ", node.op, ": the graph was already used by an earlier backward");
  bool any = false;
  for (size_t i = 0; i < node.outputs.size(); i++) {
    auto v = node.outputs[i].lock();
    if (!v || !v->grad.defined()) continue;
    node.out_grads[i] = std::move(v->grad);
    v->grad = Tensor();
    any = true;
  }
  Backward fn = std::move(node.backward);
  node.backward = nullptr;
  node.done = true;
  if (any) {
    t_running = node.op;
    Grads grads{&node};
    fn(grads);
  }
  node.out_grads.clear();
}

void backward(const Tensor& root, const Tensor& seed) {
  check(wants_grad(root), "ERR_AUTOGRAD",
        "[backward] expected a tensor that depends on a parameter, got one that does not");
  check(seed.defined() || root.numel() == 1, "ERR_SHAPE",
        "[backward] root: expected a single element or a gradient, got ", root.shape);
  Tensor g = seed;
  if (!g.defined()) {
    g = empty_like(root);
    run("backward", g.device(), &AgBackend::fill, AgFill{g.data(), g.dt, 1, 1.0});
  }
  check(g.shape == root.shape, "ERR_SHAPE", "[backward] gradient shape: expected ", root.shape, ", got ", g.shape);
  bool before = set_grad_enabled(false);
  struct Restore {
    bool value;
    ~Restore() { set_grad_enabled(value); }
  } restore{before};

  // Every consumer of a Var has a higher sequence number than its producer: the highest pending node is complete.
  std::priority_queue<std::shared_ptr<Node>, std::vector<std::shared_ptr<Node>>, BySequence> queue;
  std::unordered_map<Node*, std::vector<std::shared_ptr<Var>>> held;  // gradients on their way to a pending node
  auto schedule = [&](std::shared_ptr<Var> v) {
    if (!v || !v->node) return;
    auto& list = held[v->node.get()];
    if (list.empty()) queue.push(v->node);
    list.push_back(std::move(v));
  };
  accumulate(*root.var, std::move(g));
  schedule(root.var);
  while (!queue.empty()) {
    std::shared_ptr<Node> node = queue.top();
    queue.pop();
    run_node(*node);
    held.erase(node.get());
    for (auto& v : node->inputs) schedule(std::move(v));
    node->inputs.clear();
  }
}

Tensor grad_of(const Tensor& leaf) {
  if (!leaf.var || !leaf.var->grad.defined()) return Tensor();
  Var& v = *leaf.var;
  if (v.stale) {
    v.grad.storage->written();
    run("grad", v.device, &AgBackend::fill, AgFill{v.grad.data(), v.grad.dt, v.grad.numel(), 0.0});
    v.stale = false;
  }
  return v.grad;
}

void set_grad(const Tensor& leaf, const Tensor& buffer) {
  check(leaf.var && !leaf.var->node, "ERR_AUTOGRAD", "[setGrad] expected a leaf that requires a gradient");
  if (!buffer.defined()) {
    leaf.var->grad = Tensor();
    leaf.var->stale = false;
    return;
  }
  check(buffer.shape == leaf.shape, "ERR_SHAPE", "[setGrad] shape: expected ", leaf.shape, ", got ", buffer.shape);
  check(buffer.dt == leaf.dt || (leaf.dt == AG_BF16 && buffer.dt == AG_F32), "ERR_DTYPE", "[setGrad] dtype: expected ",
        dtype_name(leaf.dt), " or f32, got ", dtype_name(buffer.dt));
  leaf.var->grad = buffer.detached();
  leaf.var->stale = true;
}

void zero_grad(const Tensor& leaf) {
  if (leaf.var && leaf.var->grad.defined()) leaf.var->stale = true;
}

}  // namespace ag
