// The boundary: the only file that knows JavaScript. One State per environment (main thread or worker) holds the
// table of handles; every export is an ordinary C++ function whose arguments a typed converter checks.
#include <napi.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "cpu/pool.h"
#include "file.h"
#include "graph.h"
#include "ops/ops.h"
#include "signals.h"

namespace ag {
extern "C" const char* ag_cpu_level_error(void);

namespace {

// ---- handles ----------------------------------------------------------------------------------------
// A handle is an integer: slot index in the low 24 bits, generation above (environment number and reuse count), so a
// stale handle or one of another environment is found out. The garbage collector owns nothing.
class State {
 public:
  static constexpr int kIndexBits = 24;
  State() : generation_(uint32_t(++counter_ % 255 + 1) << 21) {}

  double put(Tensor t) {
    uint32_t index;
    if (!free_.empty()) {
      index = free_.back();
      free_.pop_back();
    } else {
      check(slots_.size() < (size_t(1) << kIndexBits), "ERR_MEMORY", "[handle] too many live tensors");
      index = uint32_t(slots_.size());
      slots_.push_back(Slot{Tensor(), generation_, 0});
    }
    Slot& s = slots_[index];
    s.t = std::move(t);
    s.scope = int(scopes_.size());
    live_++;
    if (!scopes_.empty()) scopes_.back().push_back({index, s.generation});
    return double((uint64_t(s.generation) << kIndexBits) | index);
  }

  Tensor& get(const char* op, double handle) {
    Slot* s = find(handle);
    check(s != nullptr, "ERR_HANDLE", "[", op, "] tensor: expected a live handle of this thread, got ", describe(handle));
    return s->t;
  }
  bool live(double handle) { return find(handle) != nullptr; }

  void dispose(double handle) {
    Slot* s = find(handle);
    check(s != nullptr, "ERR_HANDLE", "[dispose] tensor: expected a live handle of this thread, got ", describe(handle));
    release(uint32_t(s - slots_.data()));
  }

  double scope_begin() {
    scopes_.emplace_back();
    return double(scopes_.size());
  }
  void scope_end(double depth) {
    check(!scopes_.empty() && depth == double(scopes_.size()), "ERR_ARGUMENT", "[scopeEnd] depth: expected ", scopes_.size(), ", got ", depth);
    std::vector<Entry> entries = std::move(scopes_.back());
    int level = int(scopes_.size());
    scopes_.pop_back();
    for (const Entry& e : entries) {
      Slot& s = slots_[e.index];
      if (s.generation == e.generation && s.t.defined() && s.scope == level) release(e.index);
    }
  }
  // Hands a tensor of the current scope to the enclosing one.
  void keep(double handle) {
    Slot* s = find(handle);
    check(s != nullptr, "ERR_HANDLE", "[keep] tensor: expected a live handle of this thread, got ", describe(handle));
    if (s->scope == 0 || s->scope != int(scopes_.size())) return;  // already outside this scope
    s->scope--;
    if (s->scope > 0) scopes_[s->scope - 1].push_back({uint32_t(s - slots_.data()), s->generation});
  }
  // Takes a tensor out of every scope.
  void persist(double handle) {
    Slot* s = find(handle);
    check(s != nullptr, "ERR_HANDLE", "[persist] tensor: expected a live handle of this thread, got ", describe(handle));
    s->scope = 0;
  }
  int64_t handles() const { return live_; }

  // Graphs have numbers of their own, which are not used again.
  double put(std::unique_ptr<Graph> graph) {
    graphs_[++last_graph_] = std::move(graph);
    return last_graph_;
  }
  Graph& graph(const char* op, double number) {
    auto it = graphs_.find(number);
    check(it != graphs_.end(), "ERR_HANDLE", "[", op, "] graph: expected a live one of this thread, got ", number);
    return *it->second;
  }
  void drop_graph(double number) {
    graph("graphDispose", number);
    graphs_.erase(number);
  }

 private:
  struct Slot {
    Tensor t;
    uint32_t generation;
    int scope;
  };
  struct Entry {
    uint32_t index, generation;
  };

  Slot* find(double handle) {
    if (!(handle >= 0) || handle >= 9007199254740992.0 || std::floor(handle) != handle) return nullptr;
    uint64_t h = uint64_t(handle);
    uint32_t index = uint32_t(h & ((1u << kIndexBits) - 1));
    if (index >= slots_.size()) return nullptr;
    Slot& s = slots_[index];
    return s.generation == (h >> kIndexBits) && s.t.defined() ? &s : nullptr;
  }
  std::string describe(double handle) const { return cat(handle, " (disposed, from another thread, or never one)"); }
  void release(uint32_t index) {
    Slot& s = slots_[index];
    s.t = Tensor();
    live_--;
    // After 2^21 reuses the slot is retired, so no generation ever comes back.
    if ((++s.generation & ((1u << 21) - 1)) != 0) free_.push_back(index);
  }

  static inline std::atomic<uint32_t> counter_{0};
  uint32_t generation_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  std::vector<std::vector<Entry>> scopes_;
  int64_t live_ = 0;
  std::map<double, std::unique_ptr<Graph>> graphs_;
  double last_graph_ = 0;
};

// ---- converter --------------------------------------------------------------------------------------
struct Call {
  State& state;
  const char* op;
};

std::string type_of(const Napi::Value& v) {
  if (v.IsUndefined()) return "undefined";
  if (v.IsNull()) return "null";
  if (v.IsNumber()) return cat(v.As<Napi::Number>().DoubleValue());
  if (v.IsString()) return "a string";
  if (v.IsBoolean()) return "a boolean";
  if (v.IsBigInt()) return "a bigint";
  if (v.IsArray()) return "an array";
  if (v.IsTypedArray()) return "a typed array";
  if (v.IsFunction()) return "a function";
  if (v.IsSymbol()) return "a symbol";
  return "an object";
}

// Which argument a message is about. Written out only for a message: most calls need none, and take a microsecond in all.
struct What {
  const char* name = nullptr;  // of a field
  int64_t number = 0;          // of an argument, from 1; with `of`, of an entry, from 0
  const What* of = nullptr;
  What(const char* name) : name(name) {}
  explicit What(int64_t argument) : number(argument) {}
  What(const What& of, int64_t entry) : number(entry), of(&of) {}
};
std::ostream& operator<<(std::ostream& s, const What& w) {
  if (w.of) return s << *w.of << "[" << w.number << "]";
  return w.name ? s << w.name : s << "argument " << w.number;
}

[[noreturn]] void bad_argument(const Call& c, const What& what, const char* expected, const Napi::Value& got) {
  fail("ERR_ARGUMENT", "[", c.op, "] ", what, ": expected ", expected, ", got ", type_of(got));
}

template <class T>
struct From;

template <>
struct From<double> {
  static double value(const Call& c, const Napi::Value& v, const What& what) {
    if (!v.IsNumber()) bad_argument(c, what, "a number", v);
    return v.As<Napi::Number>().DoubleValue();
  }
};
template <>
struct From<int64_t> {
  static int64_t value(const Call& c, const Napi::Value& v, const What& what) {
    double d = v.IsNumber() ? v.As<Napi::Number>().DoubleValue() : NAN;
    if (!(std::fabs(d) < 9007199254740992.0) || std::floor(d) != d) bad_argument(c, what, "a safe integer", v);
    return int64_t(d);
  }
};
template <>
struct From<bool> {
  static bool value(const Call& c, const Napi::Value& v, const What& what) {
    if (!v.IsBoolean()) bad_argument(c, what, "a boolean", v);
    return v.As<Napi::Boolean>().Value();
  }
};
template <>
struct From<std::string> {
  static std::string value(const Call& c, const Napi::Value& v, const What& what) {
    if (!v.IsString()) bad_argument(c, what, "a string", v);
    return v.As<Napi::String>().Utf8Value();
  }
};
template <>
struct From<Tensor> {
  static Tensor value(const Call& c, const Napi::Value& v, const What& what) {
    if (!v.IsNumber()) bad_argument(c, what, "a tensor handle", v);
    return c.state.get(c.op, v.As<Napi::Number>().DoubleValue());
  }
};
template <>
struct From<Device*> {
  static Device* value(const Call& c, const Napi::Value& v, const What& what) {
    if (!v.IsString()) bad_argument(c, what, "cpu or cuda", v);
    return &device_named(v.As<Napi::String>().Utf8Value());
  }
};
template <class T>
struct From<std::optional<T>> {
  static std::optional<T> value(const Call& c, const Napi::Value& v, const What& what) {
    if (v.IsUndefined() || v.IsNull()) return std::nullopt;
    return From<T>::value(c, v, what);
  }
};
template <class T>
struct From<std::vector<T>> {
  static std::vector<T> value(const Call& c, const Napi::Value& v, const What& what) {
    if (!v.IsArray()) bad_argument(c, what, "an array", v);
    Napi::Array a = v.As<Napi::Array>();
    uint32_t n = a.Length();
    check(n <= (1u << 24), "ERR_ARGUMENT", "[", c.op, "] ", what, ": expected at most 2^24 entries, got ", n);
    std::vector<T> out;
    for (uint32_t i = 0; i < n; i++) {
      Napi::Value e = a[i];
      out.push_back(From<T>::value(c, e, What(what, int64_t(i))));
    }
    return out;
  }
};
// Reads the fields of an object by name.
struct Fields {
  const Call& c;
  Napi::Object o;
  Fields(const Call& c, const Napi::Value& v, const What& what) : c(c) {
    if (!v.IsObject()) bad_argument(c, what, "an object", v);
    o = v.As<Napi::Object>();
  }
  template <class T>
  void operator()(const char* key, T& field) {
    Napi::Value e = o.Get(key);
    field = From<T>::value(c, e, key);
  }
};
template <>
struct From<ops::AlignMixIn> {
  static ops::AlignMixIn value(const Call& c, const Napi::Value& v, const What& what) {
    Fields read(c, v, what);
    ops::AlignMixIn in;
    read("x", in.x);
    read("weight", in.weight);
    read("bias", in.bias);
    read("embed", in.embed);
    read("table", in.table);
    read("tokens", in.tokens);
    read("imageRows", in.image_rows);
    read("alignRows", in.align_rows);
    read("patches", in.patches);
    read("mode", in.mode);
    read("levels", in.levels);
    read("coefficients", in.coefficients);
    read("gateIds", in.gate_ids);
    read("gateOffsets", in.gate_offsets);
    read("gate", in.gate);
    read("global", in.global);
    return in;
  }
};
template <>
struct From<ops::QkvIn> {
  static ops::QkvIn value(const Call& c, const Napi::Value& v, const What& what) {
    Fields read(c, v, what);
    ops::QkvIn in;
    read("x", in.x);
    read("heads", in.heads);
    read("kvHeads", in.kv_heads);
    read("weights", in.weights);
    read("biases", in.biases);
    read("plus", in.plus);
    read("position", in.position);
    read("cos", in.cos);
    read("sin", in.sin);
    read("kCache", in.k_cache);
    read("vCache", in.v_cache);
    read("slots", in.slots);
    return in;
  }
};
template <>
struct From<ops::AdamWIn> {
  static ops::AdamWIn value(const Call& c, const Napi::Value& v, const What& what) {
    Fields read(c, v, what);
    ops::AdamWIn in;
    read("params", in.params);
    read("grads", in.grads);
    read("masters", in.masters);
    read("m", in.m);
    read("v", in.v);
    read("lrScale", in.lr_scale);
    read("weightDecay", in.weight_decay);
    read("beta1", in.beta1);
    read("beta2", in.beta2);
    read("eps", in.eps);
    read("lr", in.lr);
    read("step", in.step);
    read("normSquared", in.norm_squared);
    read("maxNorm", in.max_norm);
    read("seed", in.seed);
    return in;
  }
};

Napi::Value to_js(Napi::Env env, State& s, Tensor t) {
  return t.defined() ? Napi::Value(Napi::Number::New(env, s.put(std::move(t)))) : env.Null();
}
Napi::Value to_js(Napi::Env env, State&, double v) { return Napi::Number::New(env, v); }
Napi::Value to_js(Napi::Env env, State&, int64_t v) { return Napi::Number::New(env, double(v)); }
Napi::Value to_js(Napi::Env env, State&, bool v) { return Napi::Boolean::New(env, v); }
Napi::Value to_js(Napi::Env env, State&, const std::string& v) { return Napi::String::New(env, v); }
template <class T>
Napi::Value to_js(Napi::Env env, State& s, const std::vector<T>& v) {
  Napi::Array a = Napi::Array::New(env, v.size());
  for (uint32_t i = 0; i < v.size(); i++) a[i] = to_js(env, s, v[i]);
  return a;
}

// ---- calling ----------------------------------------------------------------------------------------
[[noreturn]] void throw_js(Napi::Env env, const char* code, const std::string& message) {
  Napi::Error e = Napi::Error::New(env, message);
  e.Set("code", Napi::String::New(env, code));
  throw e;
}

// The CPU where no device is named.
using On = std::optional<Device*>;
Device* device_of(const On& on) { return on.value_or(&cpu()); }

// Runs `body` and turns every C++ exception into a JavaScript error with a code.
template <class Body>
Napi::Value guarded(const Napi::CallbackInfo& info, Body body) {
  Napi::Env env = info.Env();
  Call c{*env.GetInstanceData<State>(), static_cast<const char*>(info.Data())};
  try {
    return body(env, c);
  } catch (const Napi::Error&) {
    throw;
  } catch (const Error& e) {
    throw_js(env, e.code, e.what());
  } catch (const std::bad_alloc&) {
    throw_js(env, "ERR_MEMORY", cat("[", c.op, "] out of memory"));
  } catch (const std::exception& e) {
    throw_js(env, "ERR_INTERNAL", cat("[", c.op, "] ", e.what()));
  }
}

template <class... A, size_t... I>
std::tuple<std::decay_t<A>...> arguments(const Napi::CallbackInfo& info, const Call& c, std::index_sequence<I...>) {
  // only the last may be left out, when it is optional
  constexpr bool optional = (false || ... || std::is_same_v<std::decay_t<A>, On>);
  check(info.Length() == sizeof...(A) || (optional && info.Length() + 1 == sizeof...(A)), "ERR_ARGUMENT", "[", c.op,
        "] arguments: expected ", sizeof...(A), ", got ", info.Length());
  return {From<std::decay_t<A>>::value(c, info[I], What(int64_t(I + 1)))...};
}

template <auto F, class R, class... A>
Napi::Value invoke(const Napi::CallbackInfo& info, R (*)(A...)) {
  return guarded(info, [&](Napi::Env env, Call& c) -> Napi::Value {
    auto args = arguments<A...>(info, c, std::index_sequence_for<A...>());
    if constexpr (std::is_void_v<R>) {
      std::apply(F, args);
      return env.Undefined();
    } else {
      return to_js(env, c.state, std::apply(F, args));
    }
  });
}
template <auto F>
Napi::Value call(const Napi::CallbackInfo& info) {
  return invoke<F>(info, F);
}

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
  check(int64_t(d.n) == t.numel(), "ERR_SHAPE", "[", c.op, "] data: expected ", t.numel(), " elements for shape ", t.shape, ", got ", d.n);
  check(is_float(d.dt) == is_float(t.dt), "ERR_DTYPE", "[", c.op, "] data: expected ", dtype_name(t.dt), ", got ", dtype_name(d.dt));
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
    check(info.Length() == 3 || info.Length() == 4, "ERR_ARGUMENT", "[tensor] arguments: expected 3 or 4, got ", info.Length());
    Shape shape(From<std::vector<int64_t>>::value(c, info[1], "shape"));
    AgDtype dt = parse_dtype(From<std::string>::value(c, info[2], "dtype"));
    Device* device = device_of(From<On>::value(c, info[3], "device"));
    TypedData d = typed_data(c, info[0]);  // last: nothing of JavaScript runs between here and the copy
    check(int64_t(d.n) == shape.numel(), "ERR_SHAPE", "[tensor] data: expected ", shape.numel(), " elements for shape ", shape, ", got ", d.n);
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
    MemoryCounters m = device_of(From<On>::value(c, info[0], "device"))->counters();
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
  return guarded(info, [&](Napi::Env env, Call& c) -> Napi::Value { return to_js(env, c.state, c.state.scope_begin()); });
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
  return with_number(info, [](Napi::Env env, State& s, double g) { return s.graph("graphEnd", g).end(), env.Undefined(); });
}
Napi::Value graph_launch(const Napi::CallbackInfo& info) {
  return with_number(info, [](Napi::Env env, State& s, double g) { return s.graph("graphLaunch", g).launch(), env.Undefined(); });
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
void reset_peak(const On& on) { device_of(on)->reset_peak(); }
void trim(const On& on) { device_of(on)->trim(); }
void fail_after(int64_t n, const On& on) { device_of(on)->fail_after(n); }
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
