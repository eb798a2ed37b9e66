/* Stands for libcuda.so.1: every call succeeds, and the last launch is kept for tests. */
#include <string.h>

#include "cuda.h"

static size_t sizes[128], count;
static unsigned char kept[8192];
static size_t kept_bytes;
static int encodes, launches, contexts;
static CUresult answer = CUDA_SUCCESS;

/* How many bytes each parameter of the next launch has. Of later launches no parameters are read. */
void stub_sizes(const size_t *of_each, size_t how_many) {
  memcpy(sizes, of_each, how_many * sizeof *sizes);
  count = how_many;
}
size_t stub_kept(unsigned char *out) {
  memcpy(out, kept, kept_bytes);
  return kept_bytes;
}
int stub_encodes(void) { return encodes; }
int stub_launches(void) { return launches; }
int stub_contexts(void) { return contexts; }
void stub_answer(int result) { answer = result; }

static void keep(const void *data, size_t bytes) {
  memcpy(kept + kept_bytes, data, bytes);
  kept_bytes += bytes;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const unsigned numbers[] = {config->gridDimX,  config->gridDimY,  config->gridDimZ,       config->blockDimX,
                              config->blockDimY, config->blockDimZ, config->sharedMemBytes, config->numAttrs};
  ++launches;
  kept_bytes = 0;
  keep(numbers, sizeof numbers);
  keep(&config->hStream, sizeof config->hStream);
  keep(&function, sizeof function);
  for (size_t i = 0; i < count; ++i) keep(parameters[i], sizes[i]);
  count = 0;
  return answer;
}

/* The map holds all that was asked for: the first words as they are, and all of it as a hash. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *extents, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  cuuint64_t words[64] = {(cuuint64_t)address, type, rank, interleave, swizzle, promotion, fill};
  cuuint64_t hash = 1469598103934665603u;
  size_t n = 7;
  for (cuuint32_t i = 0; i < rank; ++i) {
    words[n++] = extents[i];
    words[n++] = i + 1 < rank ? strides[i] : 0;
    words[n++] = box[i];
    words[n++] = steps[i];
  }
  for (size_t i = 0; i < n; ++i) hash = (hash ^ words[i]) * 1099511628211u;
  ++encodes;
  memset(map, 0, sizeof *map);
  memcpy(map, words, sizeof *map - sizeof hash);
  memcpy((char *)map + sizeof *map - sizeof hash, &hash, sizeof hash);
  return answer;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  static __thread CUcontext of_thread;
  *context = of_thread;
  of_thread = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  ++contexts;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "another error";
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 232448;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) { return CUDA_SUCCESS; }
