// A CUDA runtime without a GPU: memory is the host's, a launch does nothing but count, everything is over at once.
// stand_in.py compiles it, with a function that returns 0 for each other one that torch's libraries want.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef void *Any;
enum { GB = 1 << 30, LARGE = 1 << 20 };
static long launches, waits;
static const size_t MEMORY = 140l * GB;

__attribute__((destructor)) static void tell(void) {
  if (launches) fprintf(stderr, "stand-in: %ld kernels, waited %ld times\n", launches, waits);
}
static int nothing(void) { return 0; }
static int launched(void) { return launches++, 0; }
static int waited(void) { return waits++, 0; }
static int handle(Any *made) {
  static uintptr_t next = 0x1000;
  return *made = (Any)(next += 16), 0;
}

// memory: pages that are never touched cost nothing, so the sizes are those of a real model
static struct { char *begin, *end; int kind; } blocks[1 << 17];
static int count;
static int take(Any *made, size_t size, int kind) {
  *made = mmap(0, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*made == MAP_FAILED || count == 1 << 17) return cudaErrorMemoryAllocation;
  blocks[count].begin = *made, blocks[count].end = (char *)*made + size, blocks[count++].kind = kind;
  return 0;
}
static int give_back(Any p) {
  for (int i = 0; i < count; i++)
    if (p && blocks[i].begin == p) {
      munmap(p, blocks[i].end > blocks[i].begin ? blocks[i].end - blocks[i].begin : 1);
      blocks[i] = blocks[--count];
      break;
    }
  return 0;
}
int cudaMalloc(Any *made, size_t size) { return take(made, size, cudaMemoryTypeDevice); }
int cudaHostAlloc(Any *made, size_t size, unsigned flags) { return take(made, size, cudaMemoryTypeHost); }
int cudaFree(Any p) { return give_back(p); }
int cudaFreeHost(Any p) { return give_back(p); }
int cudaPointerGetAttributes(struct cudaPointerAttributes *told, const char *p) {
  memset(told, 0, sizeof *told);
  told->device = -1;
  for (int i = 0; i < count; i++)
    if (p >= blocks[i].begin && p < blocks[i].end)
      told->type = blocks[i].kind, told->devicePointer = (Any)p, told->hostPointer = (Any)p, told->device = 0;
  return 0;
}
int cuPointerGetAttribute(Any *told, int which, Any p) { return *told = p, 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { return *available = *total = MEMORY, 0; }
int cudaMemcpyAsync(Any to, const void *from, size_t size, int kind, Any stream) {
  if (kind != cudaMemcpyDeviceToDevice || size < LARGE) memcpy(to, from, size);  // else it would fill the host's memory
  return 0;
}
int cudaMemcpy(Any to, const void *from, size_t size, int kind) { return waits++, cudaMemcpyAsync(to, from, size, kind, 0); }
int cudaMemsetAsync(Any to, int value, size_t size, Any stream) { return size < LARGE ? memset(to, value, size), 0 : 0; }
int cudaGetSymbolAddress(Any *told, const void *symbol) { static char room[LARGE]; return *told = room, 0; }

// the device: an H200's shape
int cudaGetDeviceCount(int *n) { return *n = 1, 0; }
int cuDeviceGetCount(int *n) { return *n = 1, 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { return *n = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaDeviceGetAttribute(int *told, int which, int device) {
  static const int known[128] = {
      [cudaDevAttrMaxThreadsPerBlock] = 1024, [cudaDevAttrMaxBlockDimX] = 1024, [cudaDevAttrMaxBlockDimY] = 1024,
      [cudaDevAttrMaxBlockDimZ] = 64, [cudaDevAttrMaxGridDimX] = 2147483647, [cudaDevAttrMaxGridDimY] = 65535,
      [cudaDevAttrMaxGridDimZ] = 65535, [cudaDevAttrMaxSharedMemoryPerBlock] = 49152, [cudaDevAttrWarpSize] = 32,
      [cudaDevAttrMaxRegistersPerBlock] = 65536, [cudaDevAttrMultiProcessorCount] = 132,
      [cudaDevAttrMaxThreadsPerMultiProcessor] = 2048, [cudaDevAttrComputeCapabilityMajor] = 9,
      [cudaDevAttrMaxSharedMemoryPerMultiprocessor] = 233472, [cudaDevAttrMaxRegistersPerMultiprocessor] = 65536,
      [cudaDevAttrMaxSharedMemoryPerBlockOptin] = 232448};
  return *told = which < 128 ? known[which] : 0, 0;
}
int cuDeviceGetAttribute(int *told, int which, int device) { return cudaDeviceGetAttribute(told, which, device); }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  *p = (struct cudaDeviceProp){
      .name = "stand-in", .totalGlobalMem = MEMORY, .sharedMemPerBlock = 49152, .regsPerBlock = 65536, .warpSize = 32,
      .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535}, .major = 9,
      .multiProcessorCount = 132, .l2CacheSize = 50 << 20, .maxThreadsPerMultiProcessor = 2048, .unifiedAddressing = 1,
      .sharedMemPerMultiprocessor = 233472, .regsPerMultiprocessor = 65536, .sharedMemPerBlockOptin = 232448};
  return 0;
}
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int device) { return cudaGetDeviceProperties(p, device); }
int cudaFuncGetAttributes(struct cudaFuncAttributes *told, const void *f) {
  *told = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 90, .binaryVersion = 90};
  return 0;
}
int cuFuncGetAttribute(int *told, int which, Any f) { return *told = which ? 0 : 1024, 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) { return *n = 2, 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { return *n = 2, 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { return *n = 2, 0; }
const char *cudaGetErrorString(int error) { return "stand-in"; }
const char *cudaGetErrorName(int error) { return "stand-in"; }
int cuGetErrorString(int error, const char **told) { return *told = "stand-in", 0; }
int cuCtxGetCurrent(Any *context) { return *context = (Any)16, 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cudaGetDriverEntryPointByVersion(const char *name, Any *f, unsigned version, unsigned long long flags, int *found) {
  Any known = dlsym(RTLD_DEFAULT, name);
  if (found) *found = 0;
  return *f = known ? known : (Any)nothing, 0;
}
int cudaGetDriverEntryPoint(const char *name, Any *f, unsigned long long flags, int *found) {
  return cudaGetDriverEntryPointByVersion(name, f, 0, flags, found);
}
int cuGetProcAddress_v2(const char *name, Any *f, int version, unsigned long long flags, int *found) {
  return cudaGetDriverEntryPointByVersion(name, f, version, flags, found);
}

// streams, events, launches
int cudaStreamCreateWithFlags(Any *s, unsigned flags) { return handle(s); }
int cudaStreamCreateWithPriority(Any *s, unsigned flags, int priority) { return handle(s); }
int cudaEventCreate(Any *e) { return handle(e); }
int cudaEventCreateWithFlags(Any *e, unsigned flags) { return handle(e); }
int cudaEventElapsedTime(float *ms, Any a, Any b) { return *ms = 1, 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -1, 0; }
int cudaStreamIsCapturing(Any s, int *told) { return *told = 0, 0; }
int cudaStreamGetCaptureInfo(Any s, int *told) { return *told = 0, 0; }
int cudaDeviceSynchronize(void) { return waited(); }
int cudaStreamSynchronize(Any s) { return waited(); }
int cudaLaunchKernel(void) { return launched(); }
int __cudaLaunchKernel(void) { return launched(); }
int cudaLaunchKernelExC(void) { return launched(); }
int cuLaunchKernel(void) { return launched(); }
int cuLaunchKernelEx(void) { return launched(); }
int cuModuleLoadData(Any *made, const void *image) { return handle(made); }
int cuModuleGetFunction(Any *made, Any module, const char *name) { return handle(made); }

// products
int cublasCreate_v2(Any *h) { return handle(h); }
int cublasGetMathMode(Any h, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(Any h, int *mode) { return *mode = 0; }
int cublasSgemm_v2(void) { return launched(); }
int cublasGemmEx(void) { return launched(); }
int cublasGemmStridedBatchedEx(void) { return launched(); }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulDescCreate(Any *d) { return handle(d); }
int cublasLtMatrixLayoutCreate(Any *d) { return handle(d); }
int cublasLtMatmulPreferenceCreate(Any *d) { return handle(d); }
int cublasLtMatmul(void) { return launched(); }
int cublasLtMatmulAlgoGetHeuristic(Any h, Any op, Any a, Any b, Any c, Any d, Any wanted, int most, char *found, int *n) {
  return memset(found, 0, 96), *n = 1, 0;  // one cublasLtMatmulHeuristicResult_t
}

// NCCL: each rank has its own part in the place of the others'
typedef struct { int size, rank; } Group;
static int width(int type) { static const int bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; return bytes[type]; }
static int group(Group **made, int size, int rank) {
  *made = malloc(sizeof(Group));
  return **made = (Group){size, rank}, 0;
}
typedef struct { char bytes[128]; } Id;
int ncclCommInitRank(Group **g, int size, Id id, int rank) { return group(g, size, rank); }
int ncclCommInitRankConfig(Group **g, int size, Id id, int rank, Any config) { return group(g, size, rank); }
int ncclCommInitRankScalable(Group **g, int size, int rank, int n, Id *ids, Any config) { return group(g, size, rank); }
int ncclCommCount(Group *g, int *n) { return *n = g->size, 0; }
int ncclCommUserRank(Group *g, int *n) { return *n = g->rank, 0; }
int ncclCommGetAsyncError(Any g, int *error) { return *error = 0; }
int ncclGetVersion(int *version) { return *version = 22907, 0; }
const char *ncclGetErrorString(int error) { return "stand-in"; }
const char *ncclGetLastError(Any g) { return "stand-in"; }
static int moved(Any to, const void *from, size_t bytes) { return to != from ? memmove(to, from, bytes), launched() : launched(); }
int ncclAllReduce(Any from, Any to, size_t n, int type) { return moved(to, from, n * width(type)); }
int ncclReduce(Any from, Any to, size_t n, int type) { return moved(to, from, n * width(type)); }
int ncclBroadcast(Any from, Any to, size_t n, int type) { return moved(to, from, n * width(type)); }
int ncclReduceScatter(char *from, Any to, size_t n, int type, int op, Group *g) {
  return moved(to, from + g->rank * n * width(type), n * width(type));
}
int ncclAllGather(Any from, char *to, size_t n, int type, Group *g) {
  for (int i = 0; i < g->size; i++) moved(to + i * n * width(type), from, n * width(type));
  return 0;
}
