// What the bindings need of CUDA's runtime, which they do not include; of the emulation where FS_EMULATE is defined.
#pragma once

#include <string>

namespace fastseq::cuda {

std::string error_of(int code);  // a text for what launch() gave
std::string obstacle();          // why no kernel can run on this machine; empty: they can
int use_device(int index);       // for this thread's next launches: this runtime is not the one that PyTorch sets

#if defined(FS_EMULATE)
void seed_schedule(unsigned seed);
void lose_message(unsigned which);
void limit_spins(unsigned long long relaxations);
#endif

}  // namespace fastseq::cuda
