// What decoder_kind.cu defines for each kind of numbers, and decoder_bindings.cpp chooses from.
#pragma once

#include "decoder.h"

namespace fastseq::cuda::decoder {

extern const DecoderLaunches full32_launches, tensor32_launches, brain_half_launches, half_launches;

}  // namespace fastseq::cuda::decoder
