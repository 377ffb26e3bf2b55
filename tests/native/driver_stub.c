// libcuda.so.1 for a machine without one: a launch is taken apart and kept for tests/stub_driver.py to read, or fails
// where that asks for it, and nothing runs.
#include <cuda.h>
#include <string.h>

enum { kMost = 256 };
int stub_parameters = 0;  // how many the next launch has, set beforehand: the driver's interface does not say
unsigned stub_grid[3];
int stub_cooperative;
int stub_launches = 0;
unsigned long long stub_stream;
int stub_failing = -1;  // that launch, counted as stub_launches is, fails ..
int stub_error;         // .. with this
unsigned long long stub_values[kMost];

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  (void)function, (void)extra;
  stub_grid[0] = config->gridDimX, stub_grid[1] = config->gridDimY, stub_grid[2] = config->gridDimZ;
  stub_stream = (unsigned long long)config->hStream, stub_cooperative = 0;
  if (stub_launches++ == stub_failing) return (CUresult)stub_error;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) stub_cooperative = config->attrs[i].value.cooperative;
  for (int i = 0; i < stub_parameters && i < kMost; ++i) memcpy(&stub_values[i], parameters[i], sizeof stub_values[i]);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY              ? "out of memory"
          : error == CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES  ? "too many resources requested for launch"
          : error == CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE ? "too many blocks in cooperative launch"
                                                         : "stub";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  (void)context;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  (void)device;
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  (void)function, (void)attribute, (void)value;
  return CUDA_SUCCESS;
}
