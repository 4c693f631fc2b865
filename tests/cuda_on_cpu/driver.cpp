/* The few calls of CUDA's driver that tiercache makes, with the driver's own signatures, upon the emulated kernels. */
#include <cstring>
#include <dlfcn.h>

typedef unsigned long long address;

extern "C" {

int shim_launch(void (*what)(const void *), const unsigned *grid, unsigned threads, unsigned shared_bytes,
                const void *with);

static int the_context, entered; /* calls that need a context fail outside of it */
static address unreachable;

void stub_refuse(address at) { unreachable = at; }
int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &the_context, device; }
int cuCtxPushCurrent_v2(void *context) { return context == &the_context ? ++entered, 0 : 201; }
int cuCtxPopCurrent_v2(void **context) { return *context = &the_context, --entered, 0; }

int cuCtxGetCurrent(void **context) { return *context = entered ? &the_context : 0, 0; }

int cuGetErrorString(int, const char **text) { return *text = "stub says no", 0; }

int cuPointerGetAttribute(void *data, int attribute, address at) {
    if (!entered || attribute != 3 || at == unreachable) return 1;
    return memcpy(data, &at, sizeof at), 0;
}

int cuModuleLoadData(void **module, const void *image) {
    *module = &the_context;
    return entered && !memcmp(image, "\177ELF", 4) ? 0 : 200;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) { /* loaded for itself alone: look where this function is */
        Dl_info self;
        dladdr((void *)&cuModuleGetFunction, &self);
        *function = dlsym(dlopen(self.dli_fname, RTLD_LAZY), name);
    }
    return module == &the_context && *function ? 0 : 500;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared_bytes, void *stream, void **arguments, void **extra) {
    const unsigned grid[3] = {x, y, z};
    if (!entered || threads_y != 1 || threads_z != 1 || (address)stream != 0x123456789a || extra) return 1;
    return shim_launch((void (*)(const void *))function, grid, threads, shared_bytes, arguments[0]);
}

struct Config {
    unsigned x, y, z, threads, threads_y, threads_z, shared_bytes;
    void *stream, *attributes;
    unsigned attribute_count;
};

int cuLaunchKernelEx(const Config *c, void *function, void **arguments, void **extra) {
    if (c->attributes || c->attribute_count) return 1;
    return cuLaunchKernel(function, c->x, c->y, c->z, c->threads, c->threads_y, c->threads_z, c->shared_bytes,
                          c->stream, arguments, extra);
}
}
