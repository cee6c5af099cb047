/* Input of the compiler's row, already preprocessed. The runner writes this text several times over, each time with
   another number for the at sign, so that it is long enough. The functions are the everyday kind: loops, switches,
   structures, strings, recursion, floating point. */
typedef unsigned char byte_@;
typedef unsigned int word_@;
typedef unsigned long size_@;

extern void *malloc(size_@);
extern void free(void *);
extern void *memcpy(void *, const void *, size_@);
extern void *memset(void *, int, size_@);
extern int memcmp(const void *, const void *, size_@);
extern size_@ strlen(const char *);

/* A string table with open addressing. */
struct entry_@ { char *key; size_@ length; long value; word_@ hash; };
struct table_@ { struct entry_@ *entries; size_@ capacity, used; };

static word_@ hash_@(const char *key, size_@ length)
{
    word_@ h = 2166136261u;
    for (size_@ i = 0; i < length; i++)
        h = (h ^ (byte_@)key[i]) * 16777619u;
    return h ^ h >> 15;
}

static struct entry_@ *slot_@(struct table_@ *t, const char *key, size_@ length, word_@ h)
{
    size_@ at = h & (t->capacity - 1);
    while (t->entries[at].key) {
        struct entry_@ *e = &t->entries[at];
        if (e->hash == h && e->length == length && memcmp(e->key, key, length) == 0)
            return e;
        at = (at + 1) & (t->capacity - 1);
    }
    return &t->entries[at];
}

static int grow_@(struct table_@ *t)
{
    struct table_@ bigger = { 0, t->capacity ? 2 * t->capacity : 16, t->used };
    bigger.entries = malloc(bigger.capacity * sizeof *bigger.entries);
    if (!bigger.entries)
        return -1;
    memset(bigger.entries, 0, bigger.capacity * sizeof *bigger.entries);
    for (size_@ i = 0; i < t->capacity; i++)
        if (t->entries[i].key)
            *slot_@(&bigger, t->entries[i].key, t->entries[i].length, t->entries[i].hash) = t->entries[i];
    free(t->entries);
    *t = bigger;
    return 0;
}

int table_add_@(struct table_@ *t, const char *key, long value)
{
    size_@ length = strlen(key);
    word_@ h = hash_@(key, length);
    if (4 * (t->used + 1) > 3 * t->capacity && grow_@(t))
        return -1;
    struct entry_@ *e = slot_@(t, key, length, h);
    if (!e->key) {
        e->key = malloc(length + 1);
        if (!e->key)
            return -1;
        memcpy(e->key, key, length + 1);
        e->length = length;
        e->hash = h;
        t->used++;
    }
    e->value += value;
    return 0;
}

/* A balanced tree. */
struct node_@ { struct node_@ *child[2]; long key; int height; };

static int height_@(const struct node_@ *n) { return n ? n->height : 0; }

static void update_@(struct node_@ *n)
{
    int a = height_@(n->child[0]), b = height_@(n->child[1]);
    n->height = 1 + (a > b ? a : b);
}

static struct node_@ *rotate_@(struct node_@ *n, int side)
{
    struct node_@ *top = n->child[!side];
    n->child[!side] = top->child[side];
    top->child[side] = n;
    update_@(n);
    update_@(top);
    return top;
}

struct node_@ *tree_add_@(struct node_@ *n, struct node_@ *leaf)
{
    if (!n) {
        leaf->child[0] = leaf->child[1] = 0;
        leaf->height = 1;
        return leaf;
    }
    int side = leaf->key > n->key;
    n->child[side] = tree_add_@(n->child[side], leaf);
    update_@(n);
    int lean = height_@(n->child[1]) - height_@(n->child[0]);
    if (lean > 1 || lean < -1) {
        side = lean > 1;
        struct node_@ *low = n->child[side];
        if (height_@(low->child[!side]) > height_@(low->child[side]))
            n->child[side] = rotate_@(low, side);
        return rotate_@(n, !side);
    }
    return n;
}

/* A calculator: numbers, variables, parentheses, the usual precedence. */
struct reader_@ { const char *at; double variables[26]; int error; };
double sum_@(struct reader_@ *r);

static void blanks_@(struct reader_@ *r)
{
    while (*r->at == ' ' || *r->at == '\t')
        r->at++;
}

static double atom_@(struct reader_@ *r)
{
    blanks_@(r);
    if (*r->at == '-') {
        r->at++;
        return -atom_@(r);
    }
    if (*r->at == '(') {
        r->at++;
        double value = sum_@(r);
        blanks_@(r);
        if (*r->at == ')')
            r->at++;
        else
            r->error = 1;
        return value;
    }
    if (*r->at >= 'a' && *r->at <= 'z')
        return r->variables[*r->at++ - 'a'];
    if (*r->at < '0' || *r->at > '9') {
        r->error = 2;
        return 0;
    }
    double value = 0, scale = 1;
    while (*r->at >= '0' && *r->at <= '9')
        value = 10 * value + (*r->at++ - '0');
    if (*r->at == '.')
        for (r->at++; *r->at >= '0' && *r->at <= '9'; r->at++)
            value += (*r->at - '0') * (scale /= 10);
    return value;
}

static double product_@(struct reader_@ *r)
{
    double value = atom_@(r);
    for (;;) {
        blanks_@(r);
        char c = *r->at;
        if (c != '*' && c != '/' && c != '%')
            return value;
        r->at++;
        double other = atom_@(r);
        if (c == '*')
            value *= other;
        else if (other == 0)
            r->error = 3;
        else if (c == '/')
            value /= other;
        else
            value -= other * (double)(long)(value / other);
    }
}

double sum_@(struct reader_@ *r)
{
    double value = product_@(r);
    for (;;) {
        blanks_@(r);
        if (*r->at == '+') {
            r->at++;
            value += product_@(r);
        } else if (*r->at == '-') {
            r->at++;
            value -= product_@(r);
        } else {
            return value;
        }
    }
}

/* A register machine. */
enum code_@ { HALT_@, LOAD_@, ADD_@, SUB_@, MUL_@, DIV_@, AND_@, SHIFT_@, LESS_@, JUMP_@, BRANCH_@, GET_@, PUT_@, CALL_@, RET_@ };
struct step_@ { byte_@ code, a, b, c; int value; };

long machine_@(const struct step_@ *program, long *memory, size_@ limit, long fuel)
{
    long r[16] = { 0 };
    int stack[64], depth = 0, at = 0;
    while (fuel-- > 0) {
        struct step_@ s = program[at++];
        long *a = &r[s.a & 15], b = r[s.b & 15], c = r[s.c & 15];
        switch ((enum code_@)s.code) {
        case HALT_@: return *a;
        case LOAD_@: *a = s.value; break;
        case ADD_@: *a = b + c; break;
        case SUB_@: *a = b - c; break;
        case MUL_@: *a = b * c; break;
        case DIV_@: if (!c) return -1; *a = b / c; break;
        case AND_@: *a = b & c; break;
        case SHIFT_@: *a = s.value < 0 ? b >> (-s.value & 63) : b << (s.value & 63); break;
        case LESS_@: *a = b < c; break;
        case JUMP_@: at = s.value; break;
        case BRANCH_@: if (*a) at = s.value; break;
        case GET_@: if ((size_@)b >= limit) return -2; *a = memory[b]; break;
        case PUT_@: if ((size_@)b >= limit) return -2; memory[b] = *a; break;
        case CALL_@: if (depth == 64) return -3; stack[depth++] = at; at = s.value; break;
        case RET_@: if (!depth) return -3; at = stack[--depth]; break;
        }
    }
    return -4;
}

/* Compression by back references, greedy, with a table of the last place of each three bytes. */
size_@ squeeze_@(const byte_@ *in, size_@ length, byte_@ *out)
{
    int last[4096];
    size_@ done = 0, at = 0, literal = 0;
    for (int i = 0; i < 4096; i++)
        last[i] = -1;
    while (at + 3 <= length) {
        word_@ key = (in[at] << 16 | in[at + 1] << 8 | in[at + 2]) * 2654435761u >> 20;
        int old = last[key];
        last[key] = (int)at;
        size_@ run = 0;
        if (old >= 0 && at - old < 65536)
            while (at + run < length && run < 255 && in[old + run] == in[at + run])
                run++;
        if (run < 4) {
            at++;
            continue;
        }
        for (; literal < at; literal++) {
            if (in[literal] == 255)
                out[done++] = 255;
            out[done++] = in[literal];
        }
        size_@ back = at - old;
        out[done++] = 254;
        out[done++] = (byte_@)run;
        out[done++] = (byte_@)back;
        out[done++] = (byte_@)(back >> 8);
        literal = at += run;
    }
    for (; literal < length; literal++)
        out[done++] = in[literal];
    return done;
}

/* Linear equations by elimination with pivots. */
int solve_@(double *a, double *b, int n)
{
    for (int k = 0; k < n; k++) {
        int best = k;
        for (int i = k + 1; i < n; i++) {
            double x = a[i * n + k], y = a[best * n + k];
            if ((x < 0 ? -x : x) > (y < 0 ? -y : y))
                best = i;
        }
        if (a[best * n + k] == 0)
            return k + 1;
        for (int j = 0; j < n; j++) {
            double t = a[k * n + j];
            a[k * n + j] = a[best * n + j];
            a[best * n + j] = t;
        }
        double t = b[k];
        b[k] = b[best];
        b[best] = t;
        for (int i = k + 1; i < n; i++) {
            double f = a[i * n + k] / a[k * n + k];
            for (int j = k; j < n; j++)
                a[i * n + j] -= f * a[k * n + j];
            b[i] -= f * b[k];
        }
    }
    for (int k = n - 1; k >= 0; k--) {
        for (int j = k + 1; j < n; j++)
            b[k] -= a[k * n + j] * b[j];
        b[k] /= a[k * n + k];
    }
    return 0;
}

/* Long multiplication, and decimal digits. */
void multiply_@(word_@ *out, const word_@ *a, size_@ m, const word_@ *b, size_@ n)
{
    memset(out, 0, (m + n) * sizeof *out);
    for (size_@ i = 0; i < m; i++) {
        unsigned long carry = 0;
        for (size_@ j = 0; j < n; j++) {
            carry += (unsigned long)a[i] * b[j] + out[i + j];
            out[i + j] = (word_@)carry;
            carry >>= 32;
        }
        out[i + n] = (word_@)carry;
    }
}

size_@ digits_@(word_@ *number, size_@ length, char *out)
{
    size_@ count = 0;
    while (length) {
        unsigned long rest = 0;
        for (size_@ i = length; i-- > 0;) {
            rest = rest << 32 | number[i];
            number[i] = (word_@)(rest / 1000000000);
            rest %= 1000000000;
        }
        while (length && !number[length - 1])
            length--;
        for (int i = 0; i < 9 && (length || rest); i++, rest /= 10)
            out[count++] = (char)('0' + rest % 10);
    }
    for (size_@ i = 0; i < count / 2; i++) {
        char t = out[i];
        out[i] = out[count - 1 - i];
        out[count - 1 - i] = t;
    }
    out[count] = 0;
    return count;
}

