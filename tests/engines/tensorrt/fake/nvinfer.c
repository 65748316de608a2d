/* A recording stand-in for TensorRT's runtime, behind the real Python bindings. It has no builder: the real one of
 * TensorRT for RTX needs no GPU, and tests build with it.
 *
 * The library's C++ classes are {vtable of destructors, pointer to an implementation}; the bindings call slot n of
 * the implementation's vtable. Every slot that is not overridden below writes its class and number into the log and
 * returns 1. Overridden ones play a small engine: two inputs, one output, one failure at a time as the test asks.
 * Slot numbers were found by calling each method of the bindings and reading the log. The parser that refits is a
 * plain virtual class: the object is its own implementation.
 */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS 110
typedef long (*Slot)();
typedef struct Object Object;
typedef struct { Slot *table; const char *kind; Object *face; } Impl;
struct Object { Slot *table; Impl *impl; const char *kind; };
typedef struct { int32_t count; int32_t pad; int64_t size[8]; } Dims;

static char journal[1 << 18];
static size_t used;
static char failing[64];      /* what goes wrong, "" for nothing */
static Dims given[2];         /* shapes of the inputs that a context was told */
static int known[2], bound[3];
static void *memory_of[3];
static void *logger;

static void note(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    used += vsnprintf(journal + used, sizeof journal - used, format, arguments);
    va_end(arguments);
}
const char *fake_journal(void) { return journal; }
void fake_reset(const char *failure) {
    used = 0; journal[0] = 0;
    memset(known, 0, sizeof known); memset(bound, 0, sizeof bound);
    snprintf(failing, sizeof failing, "%s", failure);
}
static int fails(const char *what) { return !strcmp(failing, what); }
static void complain(const char *text) { /* ILogger::log comes after version, language and destructors */
    if (logger) ((void (*)(void *, int, const char *))(*(void ***)logger)[4])(logger, 1, text);
}

static long record(Impl *self, int slot, long a, long b, long c) {
    note("%s.%d %lx %lx %lx\n", self->kind, slot, a, b, c);
    return 1;
}
#define THUNK(n) static long thunk##n(Impl *self, long a, long b, long c) { return record(self, n, a, b, c); }
#define TEN(f, n) f(n##0) f(n##1) f(n##2) f(n##3) f(n##4) f(n##5) f(n##6) f(n##7) f(n##8) f(n##9)
#define ALL(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) TEN(f, 1) TEN(f, 2) TEN(f, 3) TEN(f, 4) \
    TEN(f, 5) TEN(f, 6) TEN(f, 7) TEN(f, 8) TEN(f, 9) TEN(f, 10)
ALL(THUNK)
#define ENTRY(n) (Slot)thunk##n,
static Slot thunks[] = { ALL(ENTRY) };

static long destroyed(Object *self) { note("~%s\n", self->kind); return 0; }
/* Before a vtable stand the offset to the whole object and its type, which the bindings ask polymorphic objects for. */
static const struct { void *table; const char *name; } type = { 0, "AFake" };
static Slot described[] = { 0, (Slot)&type, destroyed, destroyed, destroyed, destroyed };
static Slot *const destructors = described + 2;

static Slot *table_of(const char *kind);
static Object *make(const char *kind) {
    Impl *impl = calloc(1, 256);
    impl->table = table_of(kind); impl->kind = kind;
    if (!strcmp(kind, "ParserRefitter")) { note("+%s\n", kind); return (Object *)impl; }
    Object *object = calloc(1, 256);
    object->table = destructors; object->impl = impl; object->kind = kind; impl->face = object;
    note("+%s\n", kind);
    return object;
}

/* -- tensors: sample [-1,4,8,8] f32, timestep [], out_sample like sample, all f32 --------------------------------- */
static const char *names[] = { "sample", "timestep", "out_sample" };
static int find(const char *name) {
    for (int i = 0; i < 3; i++) if (!strcmp(names[i], name)) return i;
    return 0;
}
static Dims shape(int tensor, int64_t batch) {
    Dims dims = { tensor == 1 ? 0 : 4, 0, { batch, 4, 8, 8 } };
    return dims;
}
static long zero() { return 0; }

/* -- running -------------------------------------------------------------------------------------------------- */
static long trusted(Impl *self, int value) { note("Runtime.setEngineHostCodeAllowed %d\n", value); return 1; }
static long deserialize(Impl *self, const char *blob, size_t size) {
    note("Runtime.deserialize %zu\n", size);
    if (size < 4 || strncmp(blob, "PLAN", 4) || fails("bad plan")) { complain("magic tag does not match"); return 0; }
    return (long)make("Engine");
}
static long tensors(Impl *self) { return 3; }
static long name_of(Impl *self, int index) { return (long)names[index]; }
static long mode_of(Impl *self, const char *name) { return find(name) == 2 ? 2 : 1; }
static long place_of(Impl *self, const char *name) { return fails("host input") && find(name) == 1; }
static Dims *engine_shape(Dims *out, Impl *self, const char *name) { *out = shape(find(name), -1); return out; }
static long new_context(Impl *self) { return fails("no context") ? 0 : (long)make("Context"); }
static long set_budget(Impl *self, long bytes) { note("Engine.setWeightStreamingBudget %ld\n", bytes); return 1; }
static long statistic(Impl *self, int which) { return 5000; }
static long activations(Impl *self) { return 6000; }
static long auto_budget(Impl *self) { return 4096; }
static long inspector(Impl *self) { return (long)make("Inspector"); }
static long information(Impl *self, int format) {
    note("Inspector.getEngineInformation %d\n", format);
    if (fails("no layers")) return (long)"";
    return (long)"{\"Layers\": [{\"Name\": \"body.conv\", \"LayerType\": \"CaskConvolution\", \"ParameterType\": \"Convolution\","
        "\"Inputs\": [{\"Name\": \"x\", \"Format/Datatype\": \"Thirty-two wide channel vectorized row major Int8 format\"}],"
        "\"Outputs\": [], \"TacticName\": \"sm80_xmma_fprop_i8i8\", \"Metadata\": \"[ONNX Layer: body.conv]\"}]}";
}
static long engine_of(Impl *self) { return (long)make("Engine"); }
static long set_profile(Impl *self, int number, void *stream) { note("Context.setOptimizationProfileAsync %d %lx\n", number, (long)stream); return !fails("profile"); }
static long set_shape(Impl *self, const char *name, const Dims *dims) {
    note("Context.setInputShape %s", name);
    for (int i = 0; i < dims->count; i++) note("%c%ld", i ? 'x' : ' ', (long)dims->size[i]);
    note("\n");
    if (fails("shape")) { complain("dimension out of the profile"); return 0; }
    given[find(name)] = *dims; known[find(name)] = 1;
    return 1;
}
static Dims *context_shape(Dims *out, Impl *self, const char *name) {
    note("Context.getTensorShape %s\n", name);
    *out = shape(find(name), known[0] && !fails("data dependent") ? given[0].size[0] : -1);
    return out;
}
static long address(Impl *self, const char *name, long memory) {
    note("Context.setTensorAddress %s %s\n", name, memory % 256 ? "odd" : "aligned");
    if (fails("address") || memory % 256) return 0;
    bound[find(name)] = 1; memory_of[find(name)] = (void *)memory;
    return 1;
}
static long infer(Impl *self, int most, const char **missing) {
    int count = 0;
    note("Context.inferShapes\n");
    for (int i = 0; i < 2; i++) if (!known[i]) { if (count < most) missing[count] = names[i]; count++; }
    return count;
}
static long enqueue(Impl *self, long stream) {
    note("Context.enqueueV3 %lx\n", stream);
    for (int i = 0; i < 2; i++) if (!known[i]) { complain("an input has no shape"); return 0; }
    for (int i = 0; i < 3; i++) if (!bound[i]) { complain("a tensor has no address"); return 0; }
    if (fails("compute")) /* no failure: the network copies its sample */
        memcpy(memory_of[2], memory_of[0], given[0].size[0] * 4 * 8 * 8 * sizeof(float));
    if (fails("call")) { complain("an illegal memory access was encountered"); return 0; }
    return 1;
}
static long refit_file(Impl *self, const char *path) { note("ParserRefitter.refitFromFile %s\n", strrchr(path, '/') + 1); return !fails("refit"); }
static long refit(Impl *self) { note("Refitter.refitCudaEngine\n"); return 1; }

static const struct { const char *kind; int slot; Slot function; } overrides[] = {
    {"Runtime", 3, deserialize}, {"Runtime", 20, trusted},
    {"Engine", 5, new_context}, {"Engine", 14, inspector}, {"Engine", 15, (Slot)engine_shape},
    {"Engine", 16, zero}, {"Engine", 17, place_of}, {"Engine", 19, mode_of}, {"Engine", 26, tensors},
    {"Engine", 27, name_of}, {"Engine", 40, set_budget}, {"Engine", 42, auto_budget},
    {"Engine", 44, activations}, {"Engine", 49, statistic},
    {"Inspector", 6, information},
    {"Context", 7, engine_of}, {"Context", 16, set_profile}, {"Context", 20, set_shape},
    {"Context", 21, (Slot)context_shape}, {"Context", 23, address}, {"Context", 27, infer}, {"Context", 36, enqueue},
    {"ParserRefitter", 1, refit_file}, {"ParserRefitter", 2, zero}, {"Refitter", 4, refit},
};
static Slot *table_of(const char *kind) {
    Slot *table = (Slot *)malloc(sizeof thunks + 2 * sizeof(Slot)) + 2;
    table[-2] = 0;
    table[-1] = (Slot)&type;
    memcpy(table, thunks, sizeof thunks);
    for (size_t i = 0; i < sizeof overrides / sizeof *overrides; i++)
        if (!strcmp(overrides[i].kind, kind))
            table[overrides[i].slot] = overrides[i].function;
    return table;
}

/* -- what the bindings link against: nine symbols ---------------------------------------------------------------- */
Object *createInferBuilder_INTERNAL(void *log, int version) { logger = log; return 0; /* as without a GPU */ }
Object *createInferRuntime_INTERNAL(void *log, int version) { logger = log; return make("Runtime"); }
Object *createInferRefitter_INTERNAL(void *engine, void *log, int version) { return make("Refitter"); }
Object *createNvOnnxParser_INTERNAL(void *network, void *log, int version) { return 0; }
Object *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *log, int version) { return make("ParserRefitter"); }
void *getBuilderPluginRegistry(int capability) { return 0; }
void *getPluginRegistry(void) { return 0; }
int initLibNvInferPlugins(void *log, const char *space) { return 1; }
int getNvOnnxParserVersion(void) { return 110400; }
