/* A stand-in for the CUDA driver, libcuda.so.1, as far as Triton uses it: a launch is written down
and not run. The names that begin with stand_in_ are for the Python beside this file. */

#include "cuda.h"
#include <stdint.h>
#include <string.h>

enum { KEPT = 1024, FUNCTIONS = 4096, ARGUMENTS = 128, OBJECTS = 16384 };

typedef struct {
    uint64_t function, stream;
    uint32_t grid[3], threads;
    uint64_t arguments[ARGUMENTS];
} Launch;

uint64_t stand_in_launches; /* how many there were; the last KEPT of them are in a ring */
Launch stand_in_kept[KEPT];
uint64_t stand_in_functions;                      /* loaded; their handles are 1, 2, ... */
uint8_t stand_in_sizes[FUNCTIONS + 1][ARGUMENTS]; /* bytes of each argument of each, then 0 */

CUresult cuLaunchKernelEx(
    const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra
) {
    Launch *kept = &stand_in_kept[stand_in_launches++ % KEPT];
    const uint8_t *sizes = stand_in_sizes[(uint64_t)function];
    *kept = (Launch){
        .function = (uint64_t)function,
        .stream = (uint64_t)config->hStream,
        .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
        .threads = config->blockDimX,
    };
    for (int i = 0; i < ARGUMENTS && sizes[i]; i++)
        memcpy(&kept->arguments[i], arguments[i], sizes[i]);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    if (stand_in_functions == FUNCTIONS)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *function = (CUfunction)++stand_in_functions;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                              : 0;
    return CUDA_SUCCESS;
}

/* The device is an H100. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    static const int values[CU_DEVICE_ATTRIBUTE_MAX] = {
        [CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR] = 9,
        [CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR] = 0,
        [CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT] = 132,
        [CU_DEVICE_ATTRIBUTE_WARP_SIZE] = 32,
        [CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK] = 65536,
        [CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN] = 232448,
        [CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR] = 233472,
    };
    *value = which < CU_DEVICE_ATTRIBUTE_MAX ? values[which] : 0;
    return CUDA_SUCCESS;
}

/* Ordinary memory stands for the device's: each address is valid there. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
    *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "refused by the stand-in for the CUDA driver";
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

/* Contexts and modules are not looked at; NULL would mean that there is none. */
CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)1;
    return CUDA_SUCCESS;
}

/* CUDA graphs are numbers from 1. A user object that a graph holds is told of the graph's end. */
uint64_t stand_in_capturing; /* the graph that streams are captured into, 0 for none */
static struct {
    uint64_t graph; /* that holds it, 0 for none */
    CUhostFn destroy;
    void *pointer;
} objects[OBJECTS + 1];
static uint64_t object_count;

CUresult cuStreamGetCaptureInfo_v2(
    CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *identity, CUgraph *graph,
    const CUgraphNode **dependencies, size_t *count
) {
    *status = stand_in_capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    *identity = stand_in_capturing;
    *graph = (CUgraph)stand_in_capturing;
    *dependencies = NULL;
    *count = 0;
    return CUDA_SUCCESS;
}

CUresult cuUserObjectCreate(
    CUuserObject *object, void *pointer, CUhostFn destroy, unsigned references, unsigned flags
) {
    if (object_count == OBJECTS || references != 1 || flags != CU_USER_OBJECT_NO_DESTRUCTOR_SYNC)
        return CUDA_ERROR_INVALID_VALUE;
    *object = (CUuserObject)++object_count;
    objects[object_count].destroy = destroy;
    objects[object_count].pointer = pointer;
    return CUDA_SUCCESS;
}

CUresult cuGraphRetainUserObject(
    CUgraph graph, CUuserObject object, unsigned references, unsigned flags
) {
    uint64_t which = (uint64_t)object;
    if (!which || which > object_count || references != 1 || flags != CU_GRAPH_USER_OBJECT_MOVE)
        return CUDA_ERROR_INVALID_VALUE;
    objects[which].graph = (uint64_t)graph;
    return CUDA_SUCCESS;
}

void stand_in_end_graph(uint64_t graph) {
    for (uint64_t i = 1; i <= object_count; i++)
        if (objects[i].graph == graph) {
            objects[i].graph = 0;
            objects[i].destroy(objects[i].pointer);
        }
}

#define NOTHING_TO_DO(...)                                                                         \
    CUresult __VA_ARGS__ { return CUDA_SUCCESS; }
NOTHING_TO_DO(cuInit(unsigned flags))
NOTHING_TO_DO(cuCtxSetCurrent(CUcontext context))
NOTHING_TO_DO(cuModuleUnload(CUmodule module))
NOTHING_TO_DO(cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value))
NOTHING_TO_DO(cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config))
NOTHING_TO_DO(cuUserObjectRelease(CUuserObject object, unsigned references))

/* For what no kernel here uses; Triton's launcher is linked to them all the same. */
#define REFUSED(...)                                                                               \
    CUresult __VA_ARGS__ { return CUDA_ERROR_NOT_SUPPORTED; }
REFUSED(cuCtxGetLimit(size_t *value, CUlimit limit))
REFUSED(cuCtxSetLimit(CUlimit limit, size_t value))
