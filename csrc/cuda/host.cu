#include "host.h"

#include "portable.h"

namespace fastseq::cuda {

std::string error_of(int code) { return error_text(code); }

#if defined(FS_EMULATE)

std::string obstacle() { return {}; }
int use_device(int) { return 0; }
void seed_schedule(unsigned seed) { set_seed(seed); }
void lose_message(unsigned which) { set_lost_message(which); }
void limit_spins(unsigned long long relaxations) { set_spin_limit(relaxations); }

#else

std::string obstacle() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  cudaGetLastError();  // it is told here, and nobody else shall find it
  if (code == cudaErrorInsufficientDriver) {
    int runtime = 0;
    cudaRuntimeGetVersion(&runtime);
    return "no NVIDIA driver is loaded, or one too old for CUDA " + std::to_string(runtime / 1000) + "." +
           std::to_string(runtime % 1000 / 10) + ", with which these kernels were built";
  }
  if (code != cudaSuccess) return std::string("CUDA finds no GPU: ") + cudaGetErrorString(code);
  return count > 0 ? std::string() : "there is no NVIDIA GPU";
}

int use_device(int index) { return static_cast<int>(cudaSetDevice(index)); }

#endif

}  // namespace fastseq::cuda
