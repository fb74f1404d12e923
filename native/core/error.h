// native/core: tensors, their memory and the tape that differentiates. The ops and the addon build on it. A file here
// sees backend.h and the files before it: error, shape, allocator, device, tensor, tape, graph, file.
//
// Errors: "[op] what, expected, got", with a code JavaScript sees as error.code.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

#include "backend.h"

namespace ag {

struct Error : std::runtime_error {
  const char* code;
  Error(const char* code, const std::string& message) : std::runtime_error(message), code(code) {}
};

template <class... A>
std::string cat(const A&... a) {
  std::ostringstream s;
  (s << ... << a);
  return s.str();
}

template <class... A>
[[noreturn]] void fail(const char* code, const A&... a) {
  throw Error(code, cat(a...));
}

template <class... A>
void check(bool ok, const char* code, const A&... a) {
  if (!ok) fail(code, a...);
}

// Throws when a kernel or a service does not answer AG_OK.
void check_status(const char* op, AgStatus status, const AgCtx& ctx);

}  // namespace ag
