// What the host code of csrc/cuda/*.cu asks of CUDA's runtime and of torch's CUDA library, so that it runs without a
// GPU: tensors of the CPU pass for its own, and a launch goes to the emulated kernel of the same name.
#include <cuda_runtime_api.h>

#include <map>
#include <stdexcept>
#include <string>

namespace {

// Runs a kernel by its name; returns the error, or null.
using Run = const char* (*)(
    const char* name, const unsigned* grid, const unsigned* block, uint64_t shared_bytes, void** arguments);

Run run = nullptr;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> result;
  return result;
}

// Of the launch that is being made.
struct {
  dim3 grid, block;
  size_t shared_bytes;
} configuration;

}  // namespace

extern "C" {

void run_kernels_by(Run given) { run = given; }

// torch's CUDA library.
int32_t aoti_torch_device_type_cuda() { return 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
int32_t torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}

// CUDA's runtime.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, struct CUstream_st*) {
  configuration = {grid, block, shared_bytes};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t) {
  const char* error = run(names().at(kernel).c_str(), &grid.x, &block.x, shared_bytes, arguments);
  if (error != nullptr) throw std::runtime_error(error);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

}  // extern "C"
