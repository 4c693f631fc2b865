/* The few calls of CUDA's driver that tiercache makes, with the driver's own signatures, upon the emulated kernels. */
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

typedef unsigned long long address;

extern "C" {

int shim_launch(void (*what)(const void *), const unsigned *grid, unsigned threads, unsigned shared_bytes,
                const void *with);

static int the_context, entered, launches; /* calls that need a context fail outside of it */
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
    ++launches;
    return shim_launch((void (*)(const void *))function, grid, threads, shared_bytes, arguments[0]);
}

struct Config {
    unsigned x, y, z, threads, threads_y, threads_z, shared_bytes;
    void *stream, *attributes;
    unsigned attribute_count;
};

static int graphs, graph_launches, told, captures; /* graphs: that live; told: nodes' arguments, anew */

int stub_count(int which) { return (int[]){launches, graphs, graph_launches, told}[which]; }
void stub_capture(int on) { captures = on; }

int cuStreamIsCapturing(void *, int *status) { return *status = captures, entered ? 0 : 201; }

struct Parameters { /* CUDA_KERNEL_NODE_PARAMS_v1 */
    void *function;
    unsigned x, y, z, threads, threads_y, threads_z, shared_bytes;
    void **arguments, **extra;
};

struct Node {
    Node *before;
    Parameters as;
    std::vector<char> argument; /* as it was when the node was told */

    void tell(const Parameters &now) {
        Dl_info self;
        dladdr(now.function, &self);
        const std::string size = std::string(self.dli_sname) + "_bytes";
        const auto bytes = (unsigned (*)())dlsym(dlopen(self.dli_fname, RTLD_LAZY), size.c_str());
        as = now, as.arguments = 0;
        argument.assign((const char *)now.arguments[0], (const char *)now.arguments[0] + bytes());
    }
};

typedef std::vector<Node *> Graph;

struct Executable {
    Graph of;
    std::vector<Node> nodes;
};

int cuGraphCreate(void **graph, unsigned flags) {
    return *graph = new Graph, ++graphs, !entered || captures || flags ? 1 : 0;
}

int cuGraphAddKernelNode(void **node, void *graph, void *const *behind, size_t count, const Parameters *with) {
    if (!entered || with->extra || with->threads_y != 1 || with->threads_z != 1 || count > 1) return 1;
    Node *const made = new Node{count ? (Node *)*behind : 0, {}, {}};
    made->tell(*with);
    ((Graph *)graph)->push_back(made);
    return *node = made, 0;
}

int cuGraphInstantiateWithFlags(void **made, void *graph, unsigned long long flags) {
    Executable *const e = new Executable{*(Graph *)graph, {}};
    for (size_t i = 0; i < e->of.size(); ++i) {
        if (e->of[i]->before != (i ? e->of[i - 1] : 0)) return 1; /* one after another, or in no order */
        e->nodes.push_back(*e->of[i]);
    }
    return *made = e, ++graphs, !entered || captures || flags ? 1 : 0;
}

int cuGraphExecKernelNodeSetParams(void *executable, void *node, const Parameters *with) {
    Executable *const e = (Executable *)executable;
    for (size_t i = 0; i < e->of.size(); ++i)
        if (e->of[i] == node) return e->nodes[i].tell(*with), ++told, 0;
    return 1;
}

int cuGraphLaunch(void *executable, void *stream) {
    if (!entered || captures || (address)stream != 0x123456789a) return captures ? 900 : 1;
    ++graph_launches;
    for (Node &each : ((Executable *)executable)->nodes) {
        const unsigned grid[3] = {each.as.x, each.as.y, each.as.z};
        const auto kernel = (void (*)(const void *))each.as.function;
        if (shim_launch(kernel, grid, each.as.threads, each.as.shared_bytes, each.argument.data())) return 1;
    }
    return 0;
}

int cuGraphExecDestroy(void *executable) { return delete (Executable *)executable, --graphs, captures ? 900 : 0; }

int cuGraphDestroy(void *graph) {
    for (Node *each : *(Graph *)graph) delete each;
    return delete (Graph *)graph, --graphs, captures ? 900 : 0;
}

int cuLaunchKernelEx(const Config *c, void *function, void **arguments, void **extra) {
    if (c->attributes || c->attribute_count) return 1;
    return cuLaunchKernel(function, c->x, c->y, c->z, c->threads, c->threads_y, c->threads_z, c->shared_bytes,
                          c->stream, arguments, extra);
}
}
