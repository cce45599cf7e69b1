/* An INT4 + LoRA backend in C, checked against golden files.
 *
 *     cc -O2 -o golden_backend golden_backend.c -lm
 *     ./golden_backend GOLDEN RESULTS
 *     int4-lora golden check GOLDEN RESULTS
 *
 * It was written from docs/golden-format.md, docs/format.md and docs/numerics.md. For each file of
 * GOLDEN it computes unpack, dequantize, int4_linear or int4_lora_linear, with sums in float, and
 * writes a file of the same name to RESULTS. Compiled with -DFAULT it subtracts 7 from the stored
 * codes instead of 8.
 */
#include <dirent.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef FAULT
#define OFFSET 7
#else
#define OFFSET 8
#endif

typedef struct { char dtype[8]; int rank; long shape[4]; const uint8_t *data; } Tensor;
static char *header;          /* JSON, terminated by 0 */
static const uint8_t *body;   /* the bytes after the header */

static void die(const char *what, const char *which) {
    fprintf(stderr, "golden_backend: %s: %s\n", what, which);
    exit(2);
}

/* Return the text after "key": in the object that starts at `from`, or NULL. Assumes that strings
 * hold no quotes. */
static char *value_of(char *from, const char *key) {
    char quoted[128];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    char *end = from, *match;
    for (int depth = 0; *end; end++) {
        depth += *end == '{';
        if (*end == '}' && --depth == 0) break;
    }
    match = strstr(from, quoted);
    return match && match < end ? match + strlen(quoted) : NULL;
}

static int attribute(const char *key, char *out, size_t size) {
    char *metadata = strstr(header, "\"__metadata__\":");
    char *value = metadata ? value_of(metadata + 15, key) : NULL;
    if (!value) return 0;
    size_t length = strcspn(++value, "\"");
    if (length >= size) die("attribute too long", key);
    memcpy(out, value, length);
    out[length] = 0;
    return 1;
}

static long number(const char *key, long otherwise) {
    char text[64];
    return attribute(key, text, sizeof text) ? atol(text) : otherwise;
}

static int tensor(const char *name, Tensor *t) {
    char *object = value_of(header, name);
    if (!object) return 0;
    char *dtype = value_of(object, "dtype"), *shape = value_of(object, "shape");
    sscanf(dtype, "\"%7[A-Z0-9]\"", t->dtype);
    t->rank = 0;
    for (char *at = shape + 1; *at != ']'; at += *at == ',') t->shape[t->rank++] = strtol(at, &at, 10);
    t->data = body + strtol(value_of(object, "data_offsets") + 1, NULL, 10);
    return 1;
}

static float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static uint32_t to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

static float half_to_float(uint16_t h) {
    float size = (h & 0x7C00) == 0x7C00 ? ((h & 0x3FF) ? NAN : INFINITY)
               : (h & 0x7C00) ? ldexpf(1024 + (h & 0x3FF), ((h >> 10) & 31) - 25)
               : ldexpf(h & 0x3FF, -24);
    return h & 0x8000 ? -size : size;
}

static uint16_t float_to_half(float f) {
    uint16_t sign = to_bits(f) >> 16 & 0x8000;
    float size = fabsf(f);
    if (isnan(f)) return 0x7E00;
    if (size >= 65520.0f) return sign | 0x7C00;
    int exponent;
    frexpf(size, &exponent);
    if (size == 0 || exponent < -13) return sign | (uint16_t)nearbyintf(ldexpf(size, 24));
    uint32_t mantissa = (uint32_t)nearbyintf(ldexpf(size, 11 - exponent)); /* 1024 to 2048 */
    return sign | (uint16_t)(((exponent + 14) << 10) + (mantissa - 1024));
}

static uint16_t float_to_brain(float f) {
    if (isnan(f)) return 0x7FC0;
    uint32_t bits = to_bits(f);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static double at(const Tensor *t, long i) {
    if (!strcmp(t->dtype, "BF16")) return from_bits((uint32_t)((const uint16_t *)t->data)[i] << 16);
    if (!strcmp(t->dtype, "F16")) return half_to_float(((const uint16_t *)t->data)[i]);
    if (!strcmp(t->dtype, "F32")) return ((const float *)t->data)[i];
    if (!strcmp(t->dtype, "F64")) return ((const double *)t->data)[i];
    if (!strcmp(t->dtype, "I64")) return ((const int64_t *)t->data)[i];
    if (!strcmp(t->dtype, "I32")) return ((const int32_t *)t->data)[i];
    return ((const int8_t *)t->data)[i];
}

static float rounded(double value, const char *dtype) {
    if (!strcmp(dtype, "BF16")) return from_bits((uint32_t)float_to_brain(value) << 16);
    return !strcmp(dtype, "F16") ? half_to_float(float_to_half(value)) : (float)value;
}

static int code(const Tensor *packed, long word, long place) {
    return (((const uint32_t *)packed->data)[word] >> 4 * place & 15) - OFFSET;
}

/* Return the weight, [out, in], rounded once to the dtype of its scale. */
static float *dense_weight(long n, long k, char *scale_dtype) {
    Tensor packed, scale, zero, g_idx;
    char strategy[16] = "", block[32] = "[1, 1]";
    long rows, columns;
    if (!tensor("weight.packed", &packed) || !tensor("weight.scale", &scale)) die("no", "weight");
    int has_zero = tensor("weight.zero_point", &zero), has_g_idx = tensor("weight.g_idx", &g_idx);
    attribute("strategy", strategy, sizeof strategy);
    attribute("block", block, sizeof block);
    sscanf(block, "[%ld, %ld]", &rows, &columns);
    long groups = scale.rank == 1 ? 1 : scale.shape[1];
    for (long j = 0; has_g_idx && j < k; j++) if (at(&g_idx, j) < 0) has_g_idx = 0;
    float *dense = malloc(sizeof(float) * n * k);
    for (long i = 0; i < n; i++) for (long j = 0; j < k; j++) {
        long group = has_g_idx ? (long)at(&g_idx, j) : j / (k / groups), row = i;
        if (!strcmp(strategy, "tensor")) row = 0;
        if (!strcmp(strategy, "block")) { row = i / rows; group = j / columns; }
        long place = row * groups + group;
        int z = !has_zero ? 0 : zero.dtype[1] == '8' ? (int)at(&zero, place)
              : code(&zero, i / 8 * groups + group, i % 8);
        int q = code(&packed, i * packed.shape[1] + j / 8, j % 8);
        dense[i * k + j] = rounded((double)(q - z) * at(&scale, place), scale.dtype);
    }
    strcpy(scale_dtype, scale.dtype);
    return dense;
}

static void add_adapters(double *y, const Tensor *x, long n) {
    Tensor a, b, scaling, ids;
    char name[32], starts[128] = "[0]";
    attribute("slices", starts, sizeof starts);
    if (!tensor("adapter_ids", &ids)) return;
    char *start = starts + 1;
    for (int s = 0; snprintf(name, 32, "lora.%d.a", s), tensor(name, &a); s++) {
        snprintf(name, 32, "lora.%d.b", s); tensor(name, &b);
        snprintf(name, 32, "lora.%d.scaling", s); tensor(name, &scaling);
        long rank = a.shape[1], k = a.shape[2], wide = b.shape[1], first = strtol(start, &start, 10);
        start += *start == ',';
        float *h = malloc(sizeof(float) * rank);
        for (long t = 0; t < x->shape[0]; t++) {
            long id = (long)at(&ids, t);
            if (id < 0) continue;
            for (long r = 0; r < rank; r++) {
                h[r] = 0;
                for (long j = 0; j < k; j++) h[r] += (float)at(x, t * k + j) * (float)at(&a, (id * rank + r) * k + j);
            }
            for (long i = 0; i < wide; i++) {
                float delta = 0;
                for (long r = 0; r < rank; r++) delta += h[r] * (float)at(&b, (id * wide + i) * rank + r);
                y[t * n + first + i] = (float)(y[t * n + first + i] + (float)at(&scaling, id) * delta);
            }
        }
        free(h);
    }
}

static double *layer(long n, long k, const Tensor *x) {
    char ignored[8];
    Tensor bias;
    long tokens = x->shape[0];
    float *dense = dense_weight(n, k, ignored);
    double *y = calloc(tokens * n + 1, sizeof(double));
    for (long t = 0; t < tokens; t++) for (long i = 0; i < n; i++) {
        float sum = 0;
        for (long j = 0; j < k; j++) sum += (float)at(x, t * k + j) * dense[i * k + j];
        y[t * n + i] = sum;
    }
    add_adapters(y, x, n);
    if (tensor("bias", &bias))
        for (long t = 0; t < tokens; t++) for (long i = 0; i < n; i++)
            y[t * n + i] = (float)(y[t * n + i] + (float)at(&bias, i));
    free(dense);
    return y;
}

static void write_result(const char *path, const char *dtype, long rows, long columns, const double *y) {
    int bytes = !strcmp(dtype, "I8") ? 1 : !strcmp(dtype, "F32") ? 4 : 2;
    char text[256];
    uint64_t length = snprintf(text, sizeof text, "{\"result\":{\"dtype\":\"%s\",\"shape\":[%ld,%ld],"
                               "\"data_offsets\":[0,%ld]}}", dtype, rows, columns, rows * columns * bytes);
    FILE *file = fopen(path, "wb");
    if (!file) die("cannot write", path);
    fwrite(&length, 8, 1, file);
    fwrite(text, 1, length, file);
    for (long i = 0; i < rows * columns; i++) {
        float f = (float)y[i];
        int8_t byte = (int8_t)y[i];
        uint16_t half = !strcmp(dtype, "BF16") ? float_to_brain(f) : float_to_half(f);
        fwrite(bytes == 1 ? (void *)&byte : bytes == 4 ? (void *)&f : (void *)&half, bytes, 1, file);
    }
    fclose(file);
}

static void answer(const char *out) {
    char function[32], wanted[16], dtype[8], format[16];
    Tensor x, packed;
    if (!attribute("function", function, sizeof function)) die("no function in", out);
    if (attribute("weight_format", format, sizeof format)) return; /* FP4 */
    attribute("result_dtype", wanted, sizeof wanted);
    strcpy(dtype, !strcmp(wanted, "bfloat16") ? "BF16" : !strcmp(wanted, "float16") ? "F16" : "F32");
    long n = number("out_features", 0), k = number("in_features", 0);
    if (!strncmp(function, "int4", 4)) {
        tensor("x", &x);
        double *y = layer(n, k, &x);
        write_result(out, dtype, x.shape[0], n, y);
        free(y);
    } else if (!strcmp(function, "dequantize")) {
        char ignored[8];
        float *dense = dense_weight(n, k, ignored);
        double *y = malloc(sizeof(double) * n * k);
        for (long i = 0; i < n * k; i++) y[i] = dense[i];
        write_result(out, dtype, n, k, y);
        free(dense), free(y);
    } else if (!strcmp(function, "unpack")) {
        tensor("packed", &packed);
        long size = number("size", 0), dim = number("dim", 1);
        long rows = dim ? packed.shape[0] : size, columns = dim ? size : packed.shape[1];
        double *y = malloc(sizeof(double) * rows * columns);
        for (long i = 0; i < rows; i++) for (long j = 0; j < columns; j++)
            y[i * columns + j] = dim ? code(&packed, i * packed.shape[1] + j / 8, j % 8)
                                     : code(&packed, i / 8 * columns + j, i % 8);
        write_result(out, "I8", rows, columns, y);
        free(y);
    }
}

int main(int count, char **arguments) {
    if (count != 3) die("usage", "golden_backend GOLDEN RESULTS");
    DIR *folder = opendir(arguments[1]);
    if (!folder) die("cannot open", arguments[1]);
    for (struct dirent *entry; (entry = readdir(folder));) {
        char path[4096], out[4096];
        size_t length = strlen(entry->d_name);
        if (length < 12 || strcmp(entry->d_name + length - 12, ".safetensors")) continue;
        snprintf(path, sizeof path, "%s/%s", arguments[1], entry->d_name);
        snprintf(out, sizeof out, "%s/%s", arguments[2], entry->d_name);
        FILE *file = fopen(path, "rb");
        if (!file) die("cannot open", path);
        fseek(file, 0, SEEK_END);
        long size = ftell(file);
        rewind(file);
        uint8_t *all = malloc(size);
        if (size < 8 || fread(all, 1, size, file) != (size_t)size) die("cannot read", path);
        fclose(file);
        uint64_t json;
        memcpy(&json, all, 8);
        header = malloc(json + 1);
        memcpy(header, all + 8, json);
        header[json] = 0;
        body = all + 8 + json;
        answer(out);
        free(header), free(all);
    }
    closedir(folder);
    return 0;
}
