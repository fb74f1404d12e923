// Between JavaScript and C++: a function of C++ becomes one of JavaScript by its own argument types.
#pragma once
#include <napi.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "handles.h"
#include "ops/ops.h"

namespace ag {

// ---- from JavaScript -------------------------------------------------------------------------------
struct Call {
  State& state;
  const char* op;
};

std::string type_of(const Napi::Value& v);

// Which argument a message is about. Written out only for a message: most calls need none, and take a microsecond in
// all.
struct What {
  const char* name = nullptr;  // of a field
  int64_t number = 0;          // of an argument, from 1; with `of`, of an entry, from 0
  const What* of = nullptr;
  What(const char* name) : name(name) {}
  explicit What(int64_t argument) : number(argument) {}
  What(const What& of, int64_t entry) : number(entry), of(&of) {}
};
std::ostream& operator<<(std::ostream& s, const What& w);

[[noreturn]] void bad_argument(const Call& c, const What& what, const char* expected, const Napi::Value& got);

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

// The structs of ops that take many arguments, from the lists of their fields.
#define AG_READ(type, field, key) read(key, in.field);
#define AG_FROM_OBJECT(Struct, FIELDS)                                           \
  template <>                                                                    \
  struct From<Struct> {                                                          \
    static Struct value(const Call& c, const Napi::Value& v, const What& what) { \
      Fields read(c, v, what);                                                   \
      Struct in;                                                                 \
      FIELDS(AG_READ)                                                            \
      return in;                                                                 \
    }                                                                            \
  };
AG_FROM_OBJECT(ops::AlignMixIn, AG_ALIGN_MIX_FIELDS)
AG_FROM_OBJECT(ops::QkvIn, AG_QKV_FIELDS)
AG_FROM_OBJECT(ops::AdamWIn, AG_ADAMW_FIELDS)

// The CPU where no device is named.
using On = std::optional<Device*>;
inline Device* device_of(const On& on) { return on.value_or(&cpu()); }

// ---- to JavaScript ---------------------------------------------------------------------------------
inline Napi::Value to_js(Napi::Env env, State& s, Tensor t) {
  return t.defined() ? Napi::Value(Napi::Number::New(env, s.put(std::move(t)))) : env.Null();
}
inline Napi::Value to_js(Napi::Env env, State&, double v) { return Napi::Number::New(env, v); }
inline Napi::Value to_js(Napi::Env env, State&, int64_t v) { return Napi::Number::New(env, double(v)); }
inline Napi::Value to_js(Napi::Env env, State&, bool v) { return Napi::Boolean::New(env, v); }
inline Napi::Value to_js(Napi::Env env, State&, const std::string& v) { return Napi::String::New(env, v); }
template <class T>
Napi::Value to_js(Napi::Env env, State& s, const std::vector<T>& v) {
  Napi::Array a = Napi::Array::New(env, v.size());
  for (uint32_t i = 0; i < v.size(); i++) a[i] = to_js(env, s, v[i]);
  return a;
}

// ---- calling ---------------------------------------------------------------------------------------
[[noreturn]] void throw_js(Napi::Env env, const char* code, const std::string& message);

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

}  // namespace ag
