// Keeps C++ exceptions from reaching Rust: a function that fails returns 1 and leaves its message
// in cllm_last_error().
#pragma once
#include <exception>
#include <stdexcept>
#include <string>

std::string &last_error();

template <typename F>
int guarded(F body) {
  try {
    body();
    return 0;
  } catch (const std::exception &error) {
    last_error() = error.what();
  } catch (...) {
    last_error() = "unknown C++ exception";
  }
  return 1;
}
