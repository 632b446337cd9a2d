/* A double of libcuda.so.1 for the ctypes layer of `local`: the calls with their real prototypes, over memory
 * files instead of a GPU. It is compiled against NVIDIA's cuda.h where that is installed, so that the compiler compares
 * the prototypes. It checks little; kvroom_lab.doubles.cuda_driver is the one that refuses what a driver refuses. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#if __has_include(<cuda.h>)
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUpointer_attribute;
typedef unsigned long long CUdeviceptr;
typedef void *CUcontext, *CUstream;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { char reserved[64]; } CUipcMemHandle;
#define cuDeviceGetUuid cuDeviceGetUuid_v2
#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuCtxPushCurrent cuCtxPushCurrent_v2
#define cuCtxPopCurrent cuCtxPopCurrent_v2
#define cuMemGetAddressRange cuMemGetAddressRange_v2
#define cuIpcOpenMemHandle cuIpcOpenMemHandle_v2
#define cuStreamDestroy cuStreamDestroy_v2
#define cuMemcpyHtoDAsync cuMemcpyHtoDAsync_v2
#define cuMemcpyDtoHAsync cuMemcpyDtoHAsync_v2
#define cuMemAlloc cuMemAlloc_v2
#define cuMemFree cuMemFree_v2
#endif

#define MOST 4096
static struct { CUdeviceptr base; size_t size; char name[64]; int fd; } held[MOST];
static __thread int depth;

static int find(CUdeviceptr at) {
    for (int i = 0; i < MOST; i++)
        if (held[i].size && held[i].base <= at && at < held[i].base + held[i].size) return i;
    return -1;
}

static CUresult map(int fd, const char *name, CUdeviceptr *at) {
    struct stat found;
    int i = 0;
    while (i < MOST && held[i].size) i++;
    if (fd < 0 || fstat(fd, &found) || i == MOST) return 400;
    void *mapped = mmap(0, found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) return 2;
    held[i].base = *at = (CUdeviceptr)mapped;
    held[i].size = found.st_size;
    held[i].fd = fd;
    snprintf(held[i].name, sizeof held[i].name, "%s", name);
    return 0;
}

static CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    if (!stream || !depth) return 201;
    memcpy((void *)to, (void *)from, size);
    return 0;
}

CUresult cuInit(unsigned int flags) { return flags ? 1 : 0; }
CUresult cuDeviceGetCount(int *count) { *count = 2; return 0; }
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) { memset(uuid->bytes, 0xA0 + device, 16); return device > 1 ? 101 : 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)(size_t)(0xC000 + device); return 0; }
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return device > 1 ? 101 : 0; }
CUresult cuCtxPushCurrent(CUcontext context) { depth++; return (size_t)context >> 4 == 0xC00 ? 0 : 201; }
CUresult cuCtxPopCurrent(CUcontext *context) { *context = 0; return depth-- > 0 ? 0 : 201; }
CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr at) {
    int i = find(at);
    if (i < 0) return 500;
    *base = held[i].base;
    *size = held[i].size;
    return 0;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr at) {
    if (attribute != 9 || find(at) < 0) return 1;
    *(int *)data = 0;
    return 0;
}
CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr base) {
    int i = find(base);
    if (i < 0 || held[i].base != base) return 1;
    memset(handle->reserved, 0, 64);
    strcpy(handle->reserved, held[i].name);
    return 0;
}
CUresult cuIpcOpenMemHandle(CUdeviceptr *base, CUipcMemHandle handle, unsigned int flags) {
    return flags == 1 ? map(open(handle.reserved, O_RDWR | O_CLOEXEC), handle.reserved, base) : 1;
}
CUresult cuMemFree(CUdeviceptr base) {
    int i = find(base);
    if (i < 0 || held[i].base != base) return 1;
    munmap((void *)base, held[i].size);
    close(held[i].fd);
    held[i].size = 0;
    return 0;
}
CUresult cuIpcCloseMemHandle(CUdeviceptr base) { return cuMemFree(base); }
CUresult cuMemAlloc(CUdeviceptr *base, size_t size) {
    int fd = memfd_create("libcuda-stub", MFD_CLOEXEC);
    char name[64];
    if (ftruncate(fd, size)) return 2;
    snprintf(name, sizeof name, "/proc/%d/fd/%d", getpid(), fd);
    return map(fd, name, base);
}
CUresult cuStreamCreate(CUstream *stream, unsigned int flags) { *stream = (CUstream)1; return flags == 1 ? 0 : 1; }
CUresult cuStreamDestroy(CUstream stream) { return stream ? 0 : 400; }
CUresult cuStreamSynchronize(CUstream stream) { return stream && depth ? 0 : 400; }
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) { return copy(to, from, size, stream); }
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) { return copy(to, (CUdeviceptr)from, size, stream); }
CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) { return copy((CUdeviceptr)to, from, size, stream); }
CUresult cuGetErrorName(CUresult error, const char **text) { *text = error == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR"; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = error == 1 ? "invalid argument" : "an error"; return 0; }
