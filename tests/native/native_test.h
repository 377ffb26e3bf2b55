// What the files of the native test program share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace fastseq {

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "native test: %s\n", what.c_str());
  std::exit(1);
}

inline void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

void check_attention();
void check_attention_of_sequences();
void check_cells();
void check_decoder();
void check_normalised();
void check_products();
void check_search();

}  // namespace fastseq
