/*
Tests of llmc/model.h: names of models and the shapes behind them, the parameter table, and the initial weights against
those that PyTorch draws.
*/
#include "llmc/model.h"
#include "dev/test/test.h"

static size_t params_of(const char* name) {
    GPTConfig c;
    if (!config_from_name(name, &c)) { return 0; }
    ParamTable t = param_table(&c);
    return param_count(&t);
}

static bool has_shape(const char* name, int L, int NH, int C, int T, int V) {
    GPTConfig c;
    return config_from_name(name, &c) && c.num_layers == L && c.num_heads == NH && c.channels == C &&
           c.max_seq_len == T && c.vocab_size == V && c.padded_vocab_size == (V + 127) / 128 * 128;
}

static void test_names(void) {
    CHECK(has_shape("d6", 6, 6, 384, 1024, 50257));
    CHECK(has_shape("d12", 12, 12, 768, 1024, 50257));
    CHECK(has_shape("gpt2:d12", 12, 12, 768, 1024, 50257));
    CHECK(has_shape("d24", 24, 16, 1024, 1024, 50257));
    CHECK(has_shape("d36", 36, 20, 1280, 1024, 50257));
    CHECK(has_shape("d48", 48, 25, 1600, 1024, 50257));
    CHECK(has_shape("gpt3:c768", 12, 12, 768, 2048, 50257));
    CHECK(has_shape("gpt3:c12288", 96, 96, 12288, 2048, 50257));
    CHECK(has_shape("cgpt:111m", 10, 12, 768, 2048, 50304));
    CHECK(has_shape("L=2,H=3,C=12", 2, 3, 12, 1024, 0)); // the data decides the vocabulary
    CHECK(has_shape("V=257,T=64,C=12,H=3,L=2", 2, 3, 12, 64, 257));

    GPTConfig c;
    CHECK(config_from_name("d12", &c) && c.gelu == GELU_TANH && c.init == INIT_NORMAL);
    CHECK(config_from_name("cgpt:111m", &c) && c.gelu == GELU_ERF && c.init == INIT_TRUNCATED);
    CHECK(c.embed_mult == 1 && c.residual_mult == 1 && c.attn_mult == 1 && c.logit_mult == 1);
}

static void test_malformed_names(void) {
    const char* names[] = {"",
                           "d",
                           "d13",
                           "d12x",
                           "d 12",
                           "d012",
                           "gpt2:gpt3:c768",
                           "gpt3:c 768",
                           "L=2,H=2,L=2,C=8",
                           "L= 2,H=2,C=8",
                           "L=4294967298,H=2,C=8",
                           "L=2,H=2,C=8,V=2147483647",
                           "gpt2:",
                           "gpt2:d13",
                           "gpt3:d12",
                           "gpt3:c769",
                           "gpt3:c768x",
                           "cgpt:111M",
                           "cgpt",
                           "L=2",
                           "L=2,H=2",
                           "L=2,H=2,C=",
                           "L=2,H=2,C=8,",
                           "L=2,,H=2,C=8",
                           "L=2;H=2;C=8",
                           "L=0,H=2,C=8",
                           "L=-1,H=2,C=8",
                           "L=2,H=2,C=8,X=1",
                           "L=2,H=2,C=8.5",
                           "L=2,H=2,C=8x",
                           "l=2,h=2,c=8"};
    GPTConfig c;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (config_from_name(names[i], &c)) {
            printf("  the name '%s' was accepted\n", names[i]);
            CHECK(false);
        }
    }
}

static void test_parameter_counts(void) {
    // GPT-2's sizes as the literature gives them; that of the paper's 111M model
    CHECK(params_of("d12") == 124439808);
    CHECK(params_of("d24") == 354823168);
    CHECK(params_of("d36") == 774030080);
    CHECK(params_of("d48") == 1557611200);
    CHECK(params_of("cgpt:111m") == 111086592);
    GPTConfig c;
    CHECK(config_from_name("d12", &c));
    ParamTable t = param_table(&c);
    CHECK(t.num_params == 124475904); // with llm.c's padding to 50304 rows
    CHECK(t.num_tensors == 148);      // 4 + 12 for each layer
}

// llm.c's file holds the rows one after the other, each with all its layers.
static void test_table_layout(void) {
    const int L = 3, C = 8, T = 16, Vp = 128;
    GPTConfig c = config_of_shape(L, 2, C, T, 11);
    ParamTable t = param_table(&c);
    const int sizes[NUM_ROWS] = {Vp * C, T * C, L * C,         L * C,     L * 3 * C * C, L * 3 * C, L * C * C, L * C,
                                 L * C,  L * C, L * 4 * C * C, L * 4 * C, L * C * 4 * C, L * C,     C,         C};
    size_t offset = 0;
    for (int r = 0; r < NUM_ROWS; r++) {
        CHECK(t.row[r].offset == offset);
        for (int l = 0; l < t.row[r].count; l++) {
            CHECK(param_offset(&t, r, l) == offset + t.row[r].size * (size_t)l);
        }
        offset += (size_t)sizes[r];
    }
    CHECK(t.num_params == offset);
    CHECK(param_count(&t) == offset - (size_t)((Vp - 11) * C));
}

static void test_tensor_index(void) {
    GPTConfig c = config_of_shape(3, 2, 8, 16, 11);
    ParamTable t = param_table(&c);
    int index = 0, row, layer;
    for (int r = 0; r < NUM_ROWS; r++) {
        for (int l = 0; l < t.row[r].count; l++, index++) {
            CHECK(tensor_index(&t, r, l) == index);
            tensor_at(&t, index, &row, &layer);
            CHECK(row == r && layer == l);
        }
    }
    CHECK(index == t.num_tensors);
}

static void test_tensor_names(void) {
    GPTConfig c = config_of_shape(12, 2, 8, 16, 11);
    ParamTable t = param_table(&c);
    char name[64];
    CHECK_STR(tensor_name(&t, WTE, 0, name, sizeof name), "transformer.wte.weight");
    CHECK_STR(tensor_name(&t, WPE, 0, name, sizeof name), "transformer.wpe.weight");
    CHECK_STR(tensor_name(&t, LN1W, 0, name, sizeof name), "transformer.h.0.ln_1.weight");
    CHECK_STR(tensor_name(&t, LN1B, 11, name, sizeof name), "transformer.h.11.ln_1.bias");
    CHECK_STR(tensor_name(&t, QKVW, 7, name, sizeof name), "transformer.h.7.attn.c_attn.qkv.weight");
    CHECK_STR(tensor_name(&t, QKVB, 7, name, sizeof name), "transformer.h.7.attn.c_attn.qkv.bias");
    CHECK_STR(tensor_name(&t, ATTPROJW, 1, name, sizeof name), "transformer.h.1.attn.c_proj.weight");
    CHECK_STR(tensor_name(&t, ATTPROJB, 1, name, sizeof name), "transformer.h.1.attn.c_proj.bias");
    CHECK_STR(tensor_name(&t, LN2W, 1, name, sizeof name), "transformer.h.1.ln_2.weight");
    CHECK_STR(tensor_name(&t, LN2B, 1, name, sizeof name), "transformer.h.1.ln_2.bias");
    CHECK_STR(tensor_name(&t, FCW, 1, name, sizeof name), "transformer.h.1.mlp.c_fc.weight");
    CHECK_STR(tensor_name(&t, FCB, 1, name, sizeof name), "transformer.h.1.mlp.c_fc.bias");
    CHECK_STR(tensor_name(&t, FCPROJW, 1, name, sizeof name), "transformer.h.1.mlp.c_proj.weight");
    CHECK_STR(tensor_name(&t, FCPROJB, 1, name, sizeof name), "transformer.h.1.mlp.c_proj.bias");
    CHECK_STR(tensor_name(&t, LNFW, 0, name, sizeof name), "transformer.ln_f.weight");
    CHECK_STR(tensor_name(&t, LNFB, 0, name, sizeof name), "transformer.ln_f.bias");
}

// Weight decay on matrices alone; LayerNorm's group holds LayerNorm's tensors alone; multipliers are 1.
static void test_table_roles(void) {
    GPTConfig c = config_of_shape(2, 2, 8, 16, 11);
    ParamTable t = param_table(&c);
    for (int r = 0; r < NUM_ROWS; r++) {
        const ParamRow* row = &t.row[r];
        CHECK(row->weight_decay == (row->cols > 1));
        CHECK((row->init_std > 0) == (row->cols > 1));
        CHECK((row->group == GROUP_LN) == (strstr(row->name, ".ln_") != NULL));
        CHECK((row->group == GROUP_ATTENTION) == (strstr(row->name, ".attn.") != NULL));
        CHECK((row->group == GROUP_MLP) == (strstr(row->name, ".mlp.") != NULL));
        CHECK((row->group == GROUP_WTE) == (r == WTE) && (row->group == GROUP_WPE) == (r == WPE));
        CHECK(row->lr_mult == 1 && row->wd_mult == 1 && row->eps_mult == 1);
    }
}

static void test_config_error(void) {
    const GPTConfig good = config_of_shape(2, 2, 8, 16, 11);
    CHECK(config_error(&good) == NULL);
    GPTConfig largest = config_of_shape(1024, 4, 65536, 1 << 20, 65536);
    CHECK(config_error(&largest) == NULL);
    GPTConfig c;
// One field set to a bad value must be refused with a message that names what is wrong.
#define REFUSED(field, value, text)                                                                                    \
    do {                                                                                                               \
        c = good;                                                                                                      \
        c.field = value;                                                                                               \
        const char* error = config_error(&c);                                                                          \
        CHECK(error != NULL && strstr(error, text) != NULL);                                                           \
    } while (0)
    REFUSED(num_layers, 0, "layers");
    REFUSED(num_layers, -1, "layers");
    REFUSED(num_layers, 1025, "layers");
    REFUSED(channels, 0, "channels");
    REFUSED(channels, 65538, "channels");
    REFUSED(num_heads, 0, "heads");
    REFUSED(num_heads, -2, "heads");
    REFUSED(num_heads, 3, "heads");
    REFUSED(max_seq_len, 0, "sequence length");
    REFUSED(max_seq_len, (1 << 20) + 1, "sequence length");
    REFUSED(vocab_size, 0, "vocabulary");
    REFUSED(vocab_size, 65537, "vocabulary");
    REFUSED(padded_vocab_size, 10, "padded");
    REFUSED(padded_vocab_size, 65665, "padded");
    REFUSED(gelu, 2, "GELU");
    REFUSED(gelu, -1, "GELU");
    REFUSED(cosine_blocks[0], 4, "cosine"); // block 2 of the blocks 0 and 1
    REFUSED(cosine_blocks[3], 1, "cosine");
#undef REFUSED
    c = good;
    c.cosine_blocks[0] = 2;
    CHECK(config_error(&c) == NULL && config_is_cosine(&c, 1) && !config_is_cosine(&c, 0));
}

// A backend that only takes weights: the flat array of the parameter table, and how often each tensor was set.
typedef struct {
    ParamTable table;
    float* weights;
    int* times_set;
} Receiver;

static void receiver_set(void* self, int row, int layer, int what, const float* values) {
    Receiver* r = (Receiver*)self;
    CHECK(what == TENSOR_WEIGHT);
    memcpy(r->weights + param_offset(&r->table, row, layer), values, r->table.row[row].size * sizeof(float));
    r->times_set[tensor_index(&r->table, row, layer)]++;
}

static Receiver receive_init(const GPTConfig* config, uint32_t seed) {
    Receiver r;
    r.table = param_table(config);
    r.weights = (float*)alloc_zeroed(r.table.num_params, sizeof(float), "a test's weights");
    r.times_set = (int*)alloc_zeroed((size_t)r.table.num_tensors, sizeof(int), "a test's counts");
    for (size_t i = 0; i < r.table.num_params; i++) {
        r.weights[i] = NAN; // every weight must be set
    }
    Backend backend;
    memset(&backend, 0, sizeof backend);
    backend.self = &r;
    backend.set = receiver_set;
    model_init_weights(config, seed, &backend);
    return r;
}

static void receiver_free(Receiver* r) {
    free(r->weights);
    free(r->times_set);
}

// The first and last used number of a tensor, and the sum of its used ones and of their squares.
typedef struct {
    int row, layer;
    double first, last, sum, sum_sq;
} Drawn;

// Every drawn tensor of the shape L=2,H=2,C=16,T=8,V=11, in the order of drawing, after PyTorch's torch.manual_seed(42):
// torch.nn.init.normal_ with standard deviation 0.02, or 0.02/sqrt(2L) for the two projections into the residual stream.
// PyTorch's vectorised functions differ from the C library's in the last bit of a float: 1e-6 of the standard
// deviation.
static void check_drawn(const Receiver* r, const Drawn* expected, int count) {
    for (int i = 0; i < count; i++) {
        const Drawn* e = &expected[i];
        const ParamRow* row = &r->table.row[e->row];
        const float* x = r->weights + param_offset(&r->table, e->row, e->layer);
        size_t used = (size_t)row->used_rows * (size_t)row->cols;
        double std = (double)row->init_std, sum = 0, sum_sq = 0;
        for (size_t k = 0; k < used; k++) {
            sum += (double)x[k];
            sum_sq += (double)x[k] * (double)x[k];
        }
        CHECK_CLOSE((double)x[0] / std, e->first / std, 1e-6);
        CHECK_CLOSE((double)x[used - 1] / std, e->last / std, 1e-6);
        CHECK_CLOSE(sum / std, e->sum / std, 1e-5);
        CHECK_CLOSE(sum_sq / (std * std), e->sum_sq / (std * std), 1e-5);
    }
}

static void test_init_against_torch(void) {
    const Drawn expected[] = {
        {WTE, 0, 0.03853830322623253, 0.04053070768713951, 0.315935232963966, 0.07049991325058398},
        {WPE, 0, 0.0007163521950133145, 0.014265391044318676, 0.06700773953343742, 0.04926474518716828},
        {QKVW, 0, 0.008076058700680733, -0.05075901374220848, -0.18461402326511234, 0.3116338686403806},
        {ATTPROJW, 0, 0.0009694309555925429, -0.005500510334968567, 0.12964235820254544, 0.025186358453743028},
        {FCW, 0, 0.00047703494783490896, -0.008650490082800388, -0.3526257116536726, 0.3853460763591595},
        {FCPROJW, 0, -0.014112853445112705, -0.005571966525167227, 0.05731719288360182, 0.10476728734205579},
        {QKVW, 1, 0.012517722323536873, -0.008781034499406815, -0.1075597475937684, 0.3091055376374802},
        {ATTPROJW, 1, 0.007388755679130554, -0.00498953415080905, 0.012067527604813222, 0.026026223650578762},
        {FCW, 1, -0.006112080067396164, 0.01922958344221115, 0.319345583600807, 0.4492771466756255},
        {FCPROJW, 1, -0.004880823194980621, 0.0009847357869148254, 0.5495173978970342, 0.09764761869767244},
    };
    GPTConfig c = config_of_shape(2, 2, 16, 8, 11);
    Receiver r = receive_init(&c, 42);
    check_drawn(&r, expected, (int)(sizeof expected / sizeof expected[0]));
    receiver_free(&r);
}

// The same with wte, wpe, c_attn and c_fc cut at two standard deviations (trunc_normal_ of PyTorch up to 2.11).
static void test_truncated_init_against_torch(void) {
    const Drawn expected[] = {
        {WTE, 0, 0.02204982377588749, -0.008436893112957478, -0.20537129366857698, 0.05508518456888766},
        {WPE, 0, -0.02129817195236683, -0.012166259810328484, -0.37328504274773877, 0.03962292319192408},
        {QKVW, 0, -0.024361155927181244, 0.01672939956188202, -0.24328028385491507, 0.24032382270766875},
        {ATTPROJW, 0, 0.0009694309555925429, -0.005500510334968567, 0.12964235820254544, 0.025186358453743028},
        {FCW, 0, -0.028580060228705406, 0.003945968579500914, -0.36219423073771395, 0.2890062630831388},
        {FCPROJW, 0, -0.014112853445112705, -0.005571966525167227, 0.05731719288360182, 0.10476728734205579},
        {QKVW, 1, -0.01582719385623932, 0.004541271366178989, -0.19409114955487894, 0.23200328999283126},
        {ATTPROJW, 1, 0.007388755679130554, -0.00498953415080905, 0.012067527604813222, 0.026026223650578762},
        {FCW, 1, -0.027985643595457077, -0.018996186554431915, 0.7029114044562448, 0.3305247732021621},
        {FCPROJW, 1, -0.004880823194980621, 0.0009847357869148254, 0.5495173978970342, 0.09764761869767244},
    };
    GPTConfig c = config_of_shape(2, 2, 16, 8, 11);
    c.init = INIT_TRUNCATED;
    Receiver r = receive_init(&c, 42);
    check_drawn(&r, expected, (int)(sizeof expected / sizeof expected[0]));
    receiver_free(&r);
}

static void test_init_constants_and_padding(void) {
    GPTConfig c = config_of_shape(3, 2, 8, 16, 11);
    Receiver r = receive_init(&c, 1);
    const ParamTable* t = &r.table;
    for (int i = 0; i < t->num_tensors; i++) { CHECK(r.times_set[i] == 1); }
    for (size_t i = 11 * 8; i < t->row[WTE].size; i++) { CHECK(r.weights[i] == 0); }
    for (int row = 0; row < NUM_ROWS; row++) {
        bool norm_weight = row == LN1W || row == LN2W || row == LNFW;
        for (size_t i = 0; t->row[row].cols == 1 && i < t->row[row].size * (size_t)t->row[row].count; i++) {
            CHECK(r.weights[t->row[row].offset + i] == (norm_weight ? 1 : 0));
        }
    }
    receiver_free(&r);
}

// Mean and variance of every drawn tensor within five standard errors; if truncated, nothing past two standard deviations.
static void check_statistics(const GPTConfig* config) {
    Receiver r = receive_init(config, 7);
    for (int i = 0; i < r.table.num_tensors; i++) {
        int row, layer;
        tensor_at(&r.table, i, &row, &layer);
        const ParamRow* p = &r.table.row[row];
        if (p->init_std == 0) { continue; }
        const float* x = r.weights + param_offset(&r.table, row, layer);
        double n = (double)p->used_rows * p->cols, std = (double)p->init_std, sum = 0, sum_sq = 0, largest = 0;
        bool cut = config->init == INIT_TRUNCATED && p->init_truncatable;
        double variance = cut ? 0.7737413 : 1; // of a standard normal cut at +-2
        for (size_t k = 0; k < (size_t)n; k++) {
            double z = (double)x[k] / std;
            sum += z;
            sum_sq += z * z;
            largest = fmax(largest, fabs(z));
        }
        CHECK_CLOSE(sum / n, 0, 5 * sqrt(variance / n));
        CHECK_CLOSE(sum_sq / n / variance, 1, 5 * sqrt(2 / n));
        CHECK(cut ? largest < 2 + 1e-6 : largest > 2.5);
    }
    receiver_free(&r);
}

static void test_init_statistics(void) {
    GPTConfig c = config_of_shape(2, 2, 64, 64, 500);
    check_statistics(&c);
    c.init = INIT_TRUNCATED;
    check_statistics(&c);
}

static void test_init_seed(void) {
    GPTConfig c = config_of_shape(1, 1, 8, 8, 11);
    Receiver a = receive_init(&c, 42), b = receive_init(&c, 42), other = receive_init(&c, 43);
    size_t bytes = a.table.num_params * sizeof(float);
    CHECK(memcmp(a.weights, b.weights, bytes) == 0);
    CHECK(memcmp(a.weights, other.weights, bytes) != 0);
    receiver_free(&a);
    receiver_free(&b);
    receiver_free(&other);
}

int main(void) {
    RUN(test_names);
    RUN(test_malformed_names);
    RUN(test_parameter_counts);
    RUN(test_table_layout);
    RUN(test_tensor_index);
    RUN(test_tensor_names);
    RUN(test_table_roles);
    RUN(test_config_error);
    RUN(test_init_against_torch);
    RUN(test_truncated_init_against_torch);
    RUN(test_init_constants_and_padding);
    RUN(test_init_statistics);
    RUN(test_init_seed);
    return test_summary();
}
