// native/addon: the boundary, the only folder that knows JavaScript. Node loads it; it sees everything but tests. This
// file is the list of exports: every one is an ordinary C++ function whose arguments a typed converter checks
// (convert.h).
#include <cstdlib>
#include <mutex>

#include "convert.h"
#include "core/file.h"
#include "cpu/level.h"
#include "cpu/pool.h"
#include "signals.h"

namespace ag {
namespace {

using Callback = Napi::Value (*)(const Napi::CallbackInfo&);
void define(Napi::Object& exports, const char* name, Callback f) {
  exports.Set(name, Napi::Function::New(exports.Env(), f, name, const_cast<char*>(name)));
}

// ---- data in and out --------------------------------------------------------------------------------
struct TypedData {
  void* p;
  size_t n;
  AgDtype dt;
};

TypedData typed_data(const Call& c, const Napi::Value& v) {
  if (!v.IsTypedArray()) bad_argument(c, "data", "a Float32Array, Float64Array, Int32Array or BigInt64Array", v);
  napi_typedarray_type type;
  size_t n;
  void* p;
  napi_status status = napi_get_typedarray_info(v.Env(), v, &type, &n, &p, nullptr, nullptr);
  check(status == napi_ok, "ERR_ARGUMENT", "[", c.op, "] data: expected a readable typed array");
  switch (type) {
    case napi_float32_array: return {p, n, AG_F32};
    case napi_float64_array: return {p, n, AG_F64};
    case napi_int32_array: return {p, n, AG_I32};
    case napi_bigint64_array: return {p, n, AG_I64};
    default: bad_argument(c, "data", "a Float32Array, Float64Array, Int32Array or BigInt64Array", v);
  }
}

void write_data(const Call& c, const Tensor& t, const TypedData& d) {
  check(int64_t(d.n) == t.numel(), "ERR_SHAPE", "[", c.op, "] data: expected ", t.numel(), " elements for shape ",
        t.shape, ", got ", d.n);
  check(is_float(d.dt) == is_float(t.dt), "ERR_DTYPE", "[", c.op, "] data: expected ", dtype_name(t.dt), ", got ",
        dtype_name(d.dt));
  if (d.n == 0) return;
  t.storage->written();
  if (d.dt == t.dt) return copy_bytes(t.device(), t.data(), d.p, t.bytes());
  Tensor staged = empty(t.device(), t.shape, d.dt);
  copy_bytes(t.device(), staged.data(), d.p, staged.bytes());
  ops::copy(t, staged);
}

// tensor(data, shape, dtype, device?)
Napi::Value make_tensor(const Napi::CallbackInfo& info) {
  return guarded(info, [&](Napi::Env env, Call& c) -> Napi::Value {
    check(info.Length() == 3 || info.Length() == 4, "ERR_ARGUMENT", "[tensor] arguments: expected 3 or 4, got ",
          info.Length());
    Shape shape(From<std::vector<int64_t>>::value(c, info[1], "shape"));
    AgDtype dt = parse_dtype(From<std::string>::value(c, info[2], "dtype"));
    Device* device = device_of(From<On>::value(c, info[3], "device"));
    TypedData d = typed_data(c, info[0]);  // last: nothing of JavaScript runs between here and the copy
    check(int64_t(d.n) == shape.numel(), "ERR_SHAPE", "[tensor] data: expected ", shape.numel(), " elements for shape ",
          shape, ", got ", d.n);
    Tensor t = empty(device, shape, dt);
    write_data(c, t, d);
    return to_js(env, c.state, t);
  });
}

// write(tensor, data)
Napi::Value write_tensor(const Napi::CallbackInfo& info) {
  return guarded(info, [&](Napi::Env env, Call& c) -> Napi::Value {
    check(info.Length() == 2, "ERR_ARGUMENT", "[write] arguments: expected 2, got ", info.Length());
    Tensor t = From<Tensor>::value(c, info[0], "tensor");
    write_data(c, t, typed_data(c, info[1]));
    return env.Undefined();
  });
}

template <class Array>
Napi::Value copy_out(Napi::Env env, const Tensor& t) {
  Array a = Array::New(env, size_t(t.numel()));
  copy_bytes(t.device(), a.Data(), t.data(), t.bytes());
  synchronize(t.device());
  return a;
}

// read(tensor) -> a typed array of its own; bf16 comes as Float32Array
Napi::Value read_tensor(const Napi::CallbackInfo& info) {
  return guarded(info, [&](Napi::Env env, Call& c) -> Napi::Value {
    check(info.Length() == 1, "ERR_ARGUMENT", "[read] arguments: expected 1, got ", info.Length());
    Tensor t = From<Tensor>::value(c, info[0], "tensor");
    switch (t.dt) {
      case AG_F32: return copy_out<Napi::Float32Array>(env, t);
      case AG_BF16: return copy_out<Napi::Float32Array>(env, ops::cast(t.detached(), "f32"));
      case AG_F64: return copy_out<Napi::Float64Array>(env, t);
      case AG_I32: return copy_out<Napi::Int32Array>(env, t);
      case AG_I64: return copy_out<Napi::BigInt64Array>(env, t);
    }
    fail("ERR_DTYPE", "[read] unknown dtype");
  });
}

double kernel_seconds(const On& on) { return double(device_of(on)->kernel_nanoseconds.load()) * 1e-9; }
// memory(device?)
Napi::Value memory(const Napi::CallbackInfo& info) {
  return guarded(info, [&](Napi::Env env, Call& c) -> Napi::Value {
    check(info.Length() <= 1, "ERR_ARGUMENT", "[memory] arguments: expected at most 1, got ", info.Length());
    MemoryCounters m = device_of(From<On>::value(c, info[0], "device"))->memory.counters();
    Napi::Object o = Napi::Object::New(env);
    o.Set("inUse", double(m.in_use));
    o.Set("peak", double(m.peak));
    o.Set("reserved", double(m.reserved));
    o.Set("blocks", double(m.blocks));
    o.Set("handles", double(c.state.handles()));
    return o;
  });
}

Napi::Object describe(Napi::Env env, const Device& device) {
  AgCapabilities caps{};
  device.backend->capabilities(&caps);
  Napi::Object o = Napi::Object::New(env);
  o.Set("name", caps.name);
  o.Set("level", caps.level);
  o.Set("device", caps.device);
  o.Set("threads", double(caps.threads));
  o.Set("memoryBytes", double(caps.memory_bytes));
  o.Set("products", caps.products);
  return o;
}
Napi::Value capabilities(const Napi::CallbackInfo& info) {
  return guarded(info, [&](Napi::Env env, Call&) -> Napi::Value { return describe(env, cpu()); });
}
// The GPU's capabilities, or a string that says why there is none.
Napi::Value probe_cuda(const Napi::CallbackInfo& info) {
  return guarded(info, [&](Napi::Env env, Call&) -> Napi::Value {
    std::string why;
    const Device* device = cuda(&why);
    if (device) return describe(env, *device);
    return Napi::String::New(env, why);
  });
}

// ---- handle calls -----------------------------------------------------------------------------------
template <class Body>
Napi::Value with_number(const Napi::CallbackInfo& info, Body body) {
  return guarded(info, [&](Napi::Env env, Call& c) -> Napi::Value {
    check(info.Length() == 1, "ERR_ARGUMENT", "[", c.op, "] arguments: expected 1, got ", info.Length());
    return body(env, c.state, From<double>::value(c, info[0], "argument 1"));
  });
}
Napi::Value scope_begin(const Napi::CallbackInfo& info) {
  return guarded(info,
                 [&](Napi::Env env, Call& c) -> Napi::Value { return to_js(env, c.state, c.state.scope_begin()); });
}
Napi::Value scope_end(const Napi::CallbackInfo& info) {
  return with_number(info, [](Napi::Env env, State& s, double depth) { return s.scope_end(depth), env.Undefined(); });
}
Napi::Value keep(const Napi::CallbackInfo& info) {
  return with_number(info, [](Napi::Env env, State& s, double h) { return s.keep(h), env.Undefined(); });
}
Napi::Value persist(const Napi::CallbackInfo& info) {
  return with_number(info, [](Napi::Env env, State& s, double h) { return s.persist(h), env.Undefined(); });
}
Napi::Value dispose(const Napi::CallbackInfo& info) {
  return with_number(info, [](Napi::Env env, State& s, double h) { return s.dispose(h), env.Undefined(); });
}
Napi::Value is_live(const Napi::CallbackInfo& info) {
  return with_number(info, [](Napi::Env env, State& s, double h) { return to_js(env, s, s.live(h)); });
}
// graphBegin(device, beside: a graph or null) -> number; graphEnd, graphLaunch, graphDispose(number)
Napi::Value graph_begin(const Napi::CallbackInfo& info) {
  return guarded(info, [&](Napi::Env env, Call& c) -> Napi::Value {
    check(info.Length() == 2, "ERR_ARGUMENT", "[graphBegin] arguments: expected 2, got ", info.Length());
    const auto beside = From<std::optional<double>>::value(c, info[1], "beside");
    const Graph* other = beside ? &c.state.graph(c.op, *beside) : nullptr;
    return to_js(env, c.state, c.state.put(std::make_unique<Graph>(From<Device*>::value(c, info[0], "device"), other)));
  });
}
Napi::Value graph_end(const Napi::CallbackInfo& info) {
  return with_number(info,
                     [](Napi::Env env, State& s, double g) { return s.graph("graphEnd", g).end(), env.Undefined(); });
}
Napi::Value graph_launch(const Napi::CallbackInfo& info) {
  return with_number(
      info, [](Napi::Env env, State& s, double g) { return s.graph("graphLaunch", g).launch(), env.Undefined(); });
}
Napi::Value graph_dispose(const Napi::CallbackInfo& info) {
  return with_number(info, [](Napi::Env env, State& s, double g) { return s.drop_graph(g), env.Undefined(); });
}
// requiresGrad changes the tensor in its slot, not a copy.
Napi::Value requires_grad(const Napi::CallbackInfo& info) {
  return guarded(info, [&](Napi::Env env, Call& c) -> Napi::Value {
    check(info.Length() == 2, "ERR_ARGUMENT", "[requiresGrad] arguments: expected 2, got ", info.Length());
    double handle = From<double>::value(c, info[0], "tensor");
    bool on = From<bool>::value(c, info[1], "on");
    set_requires_grad(c.state.get(c.op, handle), on);
    return env.Undefined();
  });
}

// ---- small functions bound directly -----------------------------------------------------------------
Tensor make_zeros(const std::vector<int64_t>& shape, const std::string& dtype, const On& on) {
  return zeros(device_of(on), Shape(shape), parse_dtype(dtype));
}
Tensor make_empty(const std::vector<int64_t>& shape, const std::string& dtype, const On& on) {
  return empty(device_of(on), Shape(shape), parse_dtype(dtype));
}
std::string device_of_tensor(const Tensor& t) { return device_name(t.device()); }
std::vector<int64_t> shape_of(const Tensor& t) { return std::vector<int64_t>(t.shape.d, t.shape.d + t.shape.rank); }
std::string dtype_of(const Tensor& t) { return dtype_name(t.dt); }
bool wants(const Tensor& t) { return wants_grad(t); }
Tensor detach(const Tensor& t) { return t.detached(); }
void run_backward(const Tensor& root, const std::optional<Tensor>& seed) { backward(root, seed.value_or(Tensor())); }
void attach_grad(const Tensor& leaf, const std::optional<Tensor>& buffer) { set_grad(leaf, buffer.value_or(Tensor())); }
void clear_grads(const std::vector<Tensor>& leaves) {
  for (const Tensor& t : leaves) zero_grad(t);
}
void reset_peak(const On& on) { device_of(on)->memory.reset_peak(); }
void trim(const On& on) { device_of(on)->memory.trim(); }
void fail_after(int64_t n, const On& on) { device_of(on)->memory.fail_after(n); }
void exit_now(int64_t status) {
  check(status >= 0 && status <= 255, "ERR_ARGUMENT", "[exit] status: expected 0..255, got ", status);
  std::_Exit(int(status));
}
void one_file_call(const std::string& path) { file_call(path); }

// A handle is worth nothing in another thread: a tensor goes there with a ticket, which is good once.
std::mutex sent_mutex;
std::map<int64_t, Tensor> sent;
int64_t send(const Tensor& t) {
  static int64_t last = 0;
  std::lock_guard<std::mutex> lock(sent_mutex);
  sent.emplace(++last, t.detached());
  return last;
}
Tensor receive(int64_t ticket) {
  std::lock_guard<std::mutex> lock(sent_mutex);
  auto found = sent.extract(ticket);
  check(!found.empty(), "ERR_HANDLE", "[receive] ticket: expected one that was not used yet, got ", ticket);
  return std::move(found.mapped());
}
int64_t threads() { return ag_threads(); }
void set_threads(int64_t n) {
  check(n >= 1 && n <= 1024, "ERR_ARGUMENT", "[setThreads] threads: expected 1..1024, got ", n);
  ag_set_threads(int(n));
}

void define_ops(Napi::Object& e) {
  define(e, "cast", call<&ops::cast>);
  define(e, "to", call<&ops::to>);
  define(e, "reshape", call<&ops::reshape>);
  define(e, "slice", call<&ops::slice>);
  define(e, "concat", call<&ops::concat>);
  define(e, "gather", call<&ops::gather>);
  define(e, "embedding", call<&ops::embedding>);
  define(e, "add", call<&ops::add>);
  define(e, "sub", call<&ops::sub>);
  define(e, "mul", call<&ops::mul>);
  define(e, "scale", call<&ops::scale>);
  define(e, "unary", call<&ops::unary>);
  define(e, "siluMul", call<&ops::silu_mul>);
  define(e, "sum", call<&ops::sum>);
  define(e, "mean", call<&ops::mean>);
  define(e, "fill", call<&ops::fill>);
  define(e, "copy", call<&ops::copy>);
  define(e, "random", call<&ops::random>);
  define(e, "pack", call<&ops::pack>);
  define(e, "unpack", call<&ops::unpack>);
  define(e, "linear", call<&ops::linear>);
  define(e, "siluMulLinear", call<&ops::silu_mul_linear>);
  define(e, "qkvLinear", call<&ops::qkv_linear>);
  define(e, "matmul", call<&ops::matmul>);
  define(e, "patchEmbedding", call<&ops::patch_embedding>);
  define(e, "layerNorm", call<&ops::layer_norm>);
  define(e, "rmsNorm", call<&ops::rms_norm>);
  define(e, "softmax", call<&ops::softmax>);
  define(e, "l2Normalize", call<&ops::l2_normalize>);
  define(e, "attention", call<&ops::attention>);
  define(e, "attentionCached", call<&ops::attention_cached>);
  define(e, "alignMix", call<&ops::align_mix>);
  define(e, "lmHeadLoss", call<&ops::lm_head_loss>);
  define(e, "crossEntropy", call<&ops::cross_entropy>);
  define(e, "contrastiveLoss", call<&ops::contrastive_loss>);
  define(e, "sumSquares", call<&ops::sum_squares>);
  define(e, "adamw", call<&ops::adamw>);
  define(e, "sample", call<&ops::sample>);
}

void define_core(Napi::Object& e) {
  define(e, "tensor", make_tensor);
  define(e, "write", write_tensor);
  define(e, "read", read_tensor);
  define(e, "zeros", call<&make_zeros>);
  define(e, "empty", call<&make_empty>);
  define(e, "shape", call<&shape_of>);
  define(e, "dtype", call<&dtype_of>);
  define(e, "device", call<&device_of_tensor>);
  define(e, "readFile", call<&read_file>);
  define(e, "writeFile", call<&write_file>);
  define(e, "fileCall", call<&one_file_call>);
  define(e, "fileCalls", call<&file_calls>);
  define(e, "failFiles", call<&fail_files>);
  define(e, "send", call<&send>);
  define(e, "receive", call<&receive>);
  define(e, "exit", call<&exit_now>);
  define(e, "secondSignalEnds", call<&second_signal_ends>);
  define(e, "scopeBegin", scope_begin);
  define(e, "scopeEnd", scope_end);
  define(e, "keep", keep);
  define(e, "persist", persist);
  define(e, "dispose", dispose);
  define(e, "isLive", is_live);
  define(e, "graphBegin", graph_begin);
  define(e, "graphEnd", graph_end);
  define(e, "graphLaunch", graph_launch);
  define(e, "graphDispose", graph_dispose);
  define(e, "requiresGrad", requires_grad);
  define(e, "wantsGrad", call<&wants>);
  define(e, "detach", call<&detach>);
  define(e, "setGradEnabled", call<&set_grad_enabled>);
  define(e, "backward", call<&run_backward>);
  define(e, "grad", call<&grad_of>);
  define(e, "setGrad", call<&attach_grad>);
  define(e, "zeroGrad", call<&clear_grads>);
  define(e, "memory", memory);
  define(e, "kernelSeconds", call<&kernel_seconds>);
  define(e, "resetPeak", call<&reset_peak>);
  define(e, "trim", call<&trim>);
  define(e, "failAfter", call<&fail_after>);
  define(e, "capabilities", capabilities);
  define(e, "probeCuda", probe_cuda);
  define(e, "threads", call<&threads>);
  define(e, "setThreads", call<&set_threads>);
}

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  if (const char* problem = ag_cpu_level_error()) throw_js(env, "ERR_CPU_LEVEL", problem);
  env.SetInstanceData(new State());
  set_grad_enabled(true);
  define_core(exports);
  define_ops(exports);
  return exports;
}

}  // namespace
}  // namespace ag

Napi::Object InitAll(Napi::Env env, Napi::Object exports) { return ag::Init(env, exports); }
NODE_API_MODULE(aligngpt, InitAll)
