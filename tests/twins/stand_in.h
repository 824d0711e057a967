// What an engine calls of CUDA, on the CPU: kernels and attention are run by whoever sets the two functions below.
#include <cstdint>
#include <cstring>
#include <deque>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// A kernel's pointer, and the memory that it may use: that of the tensor which it was taken from.
struct TwinPointer {
    uint64_t data, begin, bytes;
};
using CUdeviceptr = uint64_t;  // the address of a TwinPointer
using CUfunction = const char*;
using cudaStream_t = void*;
struct AOTICudaStreamGuard {
    AOTICudaStreamGuard(void*, int32_t) {}
};

using TwinLaunch = int (*)(const char* name, uint32_t x, uint32_t y, uint32_t z, void** arguments);
using TwinAttend = void* (*)(const char* kernel, void* query, void* key, void* value, void* mask, int32_t causal, double scale);
static TwinLaunch twin_launch = nullptr;
static TwinAttend twin_attend = nullptr;
extern "C" __attribute__((visibility("default"))) void twin_set(TwinLaunch launch, TwinAttend attend) {
    twin_launch = launch;
    twin_attend = attend;
}

static std::deque<TwinPointer> twin_pointers;  // those of the kernel that comes next

template <typename T>
static CUdeviceptr twin_pointer(const T& tensor) {
    AtenTensorHandle handle = tensor;
    void* data = nullptr;
    int64_t bytes = 0, offset = 0;
    int32_t type = 0;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &type));
    auto address = reinterpret_cast<uint64_t>(data);
    twin_pointers.push_back({address, address - offset * aoti_torch_dtype_element_size(type), static_cast<uint64_t>(bytes)});
    return reinterpret_cast<CUdeviceptr>(&twin_pointers.back());
}

static inline CUfunction loadKernel(const void*, const std::string& name, uint32_t, std::vector<void*>* = nullptr) {
    return strdup(name.c_str());
}

static inline void launchKernel(
    CUfunction name, uint32_t x, uint32_t y, uint32_t z, uint32_t, uint32_t, void* arguments[], cudaStream_t) {
    int failed = twin_launch(name, x, y, z, arguments);
    twin_pointers.clear();
    if (failed) throw std::runtime_error(std::string("the kernel ") + name + " failed");
}

// Fresh memory holds 0xFF, which is NaN in every floating-point type: what is read before it is written shows.
static AOTITorchError twin_empty(
    int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t type, int32_t device, int32_t index,
    AtenTensorHandle* made) {
    auto code = aoti_torch_empty_strided(dimensions, sizes, strides, type, device, index, made);
    void* data = nullptr;
    int64_t bytes = 0;
    if (!code && !aoti_torch_get_data_ptr(*made, &data) && !aoti_torch_get_storage_size(*made, &bytes) && bytes)
        memset(data, 0xFF, bytes);
    return code;
}

static void* twin_given(AtenTensorHandle handle) {
    AtenTensorHandle fresh = nullptr;
    if (handle) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &fresh));
    return fresh;
}

// Attention's first result; the others, which only a backward pass reads, are empty.
template <typename... Rest>
static AOTITorchError twin_attention(
    const char* kernel, AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle* mask,
    int32_t causal, double* scale, AtenTensorHandle* made, Rest... rest) {
    static const int64_t none[] = {0}, one[] = {1};
    *made = static_cast<AtenTensorHandle>(twin_attend(
        kernel, twin_given(query), twin_given(key), twin_given(value), twin_given(mask ? *mask : nullptr), causal,
        scale ? *scale : -1.0));
    for (AtenTensorHandle* each : {rest...})
        if (each && aoti_torch_empty_strided(1, none, one, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, each))
            return AOTI_TORCH_FAILURE;
    return *made ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

static inline AOTITorchError twin_flash_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, double, int32_t causal, int32_t, double* scale,
    AtenTensorHandle* made, AtenTensorHandle* a, AtenTensorHandle* b, AtenTensorHandle* c, int64_t*, int64_t*,
    AtenTensorHandle* d, AtenTensorHandle* e, AtenTensorHandle* f) {
    return twin_attention("native_flash", query, key, value, nullptr, causal, scale, made, a, b, c, d, e, f);
}

static inline AOTITorchError twin_cudnn_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle* mask, int32_t, double,
    int32_t causal, int32_t, double* scale, AtenTensorHandle* made, AtenTensorHandle* a, AtenTensorHandle* b,
    AtenTensorHandle* c, int64_t*, int64_t*, AtenTensorHandle* d, AtenTensorHandle* e, AtenTensorHandle* f) {
    return twin_attention("native_cudnn", query, key, value, mask, causal, scale, made, a, b, c, d, e, f);
}

static inline AOTITorchError twin_efficient_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle* mask, int32_t, double,
    int32_t causal, double* scale, AtenTensorHandle* made, AtenTensorHandle* a, AtenTensorHandle* b, AtenTensorHandle* c) {
    return twin_attention("native_efficient", query, key, value, mask, causal, scale, made, a, b, c);
}
