#include "convert.h"

namespace ag {

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

std::ostream& operator<<(std::ostream& s, const What& w) {
  if (w.of) return s << *w.of << "[" << w.number << "]";
  return w.name ? s << w.name : s << "argument " << w.number;
}

[[noreturn]] void bad_argument(const Call& c, const What& what, const char* expected, const Napi::Value& got) {
  fail("ERR_ARGUMENT", "[", c.op, "] ", what, ": expected ", expected, ", got ", type_of(got));
}

[[noreturn]] void throw_js(Napi::Env env, const char* code, const std::string& message) {
  Napi::Error e = Napi::Error::New(env, message);
  e.Set("code", Napi::String::New(env, code));
  throw e;
}

}  // namespace ag
