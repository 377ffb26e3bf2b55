#include "isa.h"

#include <stdexcept>

#if defined(FS_HAVE_AMX) && !defined(FS_EMULATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define FS_DECLARE(isa)                                                                                       \
  namespace isa {                                                                                             \
  void rnn_forward(const Shape&, const Sequence&, const ForwardPass*, int directions, int threads);           \
  void rnn_backward(const Shape&, const Sequence&, const BackwardPass*, int directions, int threads);         \
  void decoder_forward(const Decoder&, int threads);                                                          \
  void decoder_backward(const Decoder&, int threads);                                                         \
  void product(const Product&, int threads);                                                                  \
  void input_gradient(const Product&, int threads);                                                           \
  void weight_gradient(const WeightGradient&, int threads);                                                   \
  void attention_forward(const AttentionForward&, int threads);                                               \
  void attention_backward(const AttentionBackward&, int threads);                                             \
  double tile_rate(DType, int64_t repeats);                                                                   \
  double load_rate(int64_t bytes, int64_t repeats, int threads);                                              \
  int64_t rnn_packed_bytes(const Shape&);                                                                     \
  void rnn_pack(const Shape&, const Direction&, void*, int threads);                                          \
  void random_flags(const RandomFlags&, int threads);                                                         \
  void rnn_norm_forward(const Shape&, const Sequence&, const NormForwardPass&, int threads);                  \
  void rnn_norm_backward(const Shape&, const Sequence&, const NormBackwardPass&, int threads);                \
  bool holds(DType);                                                                                          \
  }
#define FS_ENTRY(isa, supported)                                                                              \
  Kernels {                                                                                                   \
    #isa, supported, isa::holds, isa::rnn_forward, isa::rnn_backward, isa::decoder_forward, isa::decoder_backward, \
        isa::product, isa::input_gradient, isa::weight_gradient, isa::attention_forward, isa::attention_backward, \
        isa::tile_rate, isa::load_rate, isa::rnn_packed_bytes, isa::rnn_pack, isa::random_flags,               \
        isa::rnn_norm_forward, isa::rnn_norm_backward                                                         \
  }

namespace fastseq {

FS_DECLARE(base)
#if defined(FS_HAVE_X86)
FS_DECLARE(avx2)
#endif
#if defined(FS_HAVE_AVX512)
FS_DECLARE(avx512)
#endif
#if defined(FS_HAVE_AVX512_BF16)
FS_DECLARE(avx512_bf16)
#endif
#if defined(FS_HAVE_AMX)
FS_DECLARE(amx_bf16)
#endif

namespace {

bool always() { return true; }
#if defined(FS_HAVE_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
#endif
#if defined(FS_HAVE_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#if defined(FS_HAVE_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#if defined(FS_EMULATE_AMX)
bool has_amx_bf16() { return has_avx512(); }
#elif defined(FS_HAVE_AMX)
// The system gives tile registers to a process that asks: they make what it saves of each thread 8 KB larger.
bool has_amx_bf16() {
  static const bool found = [] {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
}
#endif

const Kernels kTable[] = {
    FS_ENTRY(base, always),
#if defined(FS_HAVE_X86)
    FS_ENTRY(avx2, has_avx2),
#endif
#if defined(FS_HAVE_AVX512)
    FS_ENTRY(avx512, has_avx512),
#endif
#if defined(FS_HAVE_AVX512_BF16)
    FS_ENTRY(avx512_bf16, has_avx512_bf16),
#endif
#if defined(FS_HAVE_AMX)
    FS_ENTRY(amx_bf16, has_amx_bf16),
#endif
};

// Intel's CPUs multiply bf16 in tile registers, or without them best as floats: of a Xeon with AMX, vdpbf16ps takes as long as four
// multiply-adds of fp32, twice as many as it saves. Others of Intel's were not measured.
bool pays([[maybe_unused]] const Kernels& k) {
#if defined(FS_HAVE_AVX512_BF16)
  return k.supported != has_avx512_bf16 || !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

const Kernels *chosen = nullptr, *chosen_for[2];  // by DType

}  // namespace

const char* isa() {
  if (!chosen) choose_isa("");
  return chosen->isa;
}

const Kernels& kernels(DType dtype) {
  if (!chosen) choose_isa("");
  return *chosen_for[static_cast<int>(dtype)];
}

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const Kernels& k : kTable)
    if (k.supported()) names.push_back(k.isa);
  return names;
}

void choose_isa(const std::string& name) {
  const Kernels* found = nullptr;
  for (const Kernels& k : kTable)
    if ((name.empty() ? pays(k) : name == k.isa) && k.supported()) found = &k;  // asked last: it may ask the system for registers
  if (!found) {
    std::string available;
    for (const char* isa : available_isas()) available += std::string(available.empty() ? "" : ", ") + isa;
    throw std::invalid_argument("FASTSEQ_ISA=" + name + " is not available here; choose one of: " + available);
  }
  chosen = found;
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const Kernels* k = kTable; k <= chosen; ++k)
      if (k->supported() && k->holds(dtype)) chosen_for[static_cast<int>(dtype)] = k;
}

std::vector<std::pair<const char*, bool>> cpu_features() {
#if defined(FS_HAVE_X86)
  return {{"avx2", __builtin_cpu_supports("avx2") != 0},
          {"fma", __builtin_cpu_supports("fma") != 0},
          {"avx512f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
          {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
#if defined(FS_HAVE_AVX512_BF16)
          {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0},
#endif
#if defined(FS_HAVE_AMX)
          {"amx_bf16", has_amx_bf16()},
#endif
          {"avx512dq", __builtin_cpu_supports("avx512dq") != 0}};
#else
  return {};
#endif
}

}  // namespace fastseq
