/* A plain C hash, for comparison with the table: one thread, no atomics, nothing freed, no order.
   Open addressing over pointers to entries, FNV-1a, memcmp. It owns nothing of the product. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *id;
    size_t length;
    uint64_t hash;
    int64_t last_used_ms;
    uint32_t in_flight;
    uint32_t calls;
} chash_entry;

typedef struct {
    chash_entry **places;
    size_t mask;
} chash;

static inline uint64_t chash_of(const char *id, size_t length) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < length; i++)
        h = (h ^ (uint8_t)id[i]) * 0x100000001b3u;
    return h;
}

static chash *chash_new(size_t count) {
    chash *c = malloc(sizeof *c);
    size_t size = 64;
    while (size < count * 2)
        size *= 2;
    c->places = calloc(size, sizeof *c->places);
    c->mask = size - 1;
    return c;
}

static void chash_put(chash *c, const char *id, size_t length) {
    uint64_t h = chash_of(id, length);
    size_t at = h & c->mask;
    chash_entry *e = calloc(1, sizeof *e);
    char *copy = malloc(length);
    memcpy(copy, id, length);
    e->id = copy;
    e->length = length;
    e->hash = h;
    while (c->places[at])
        at = (at + 1) & c->mask;
    c->places[at] = e;
}

static inline chash_entry *chash_find(const chash *c, const char *id, size_t length) {
    uint64_t h = chash_of(id, length);
    for (size_t at = h & c->mask; c->places[at]; at = (at + 1) & c->mask) {
        chash_entry *e = c->places[at];
        if (e->hash == h && e->length == length && memcmp(e->id, id, length) == 0)
            return e;
    }
    return NULL;
}

static inline void chash_hit(const chash *c, const char *id, size_t length, int64_t now_ms) {
    chash_entry *e = chash_find(c, id, length);
    if (!e)
        return;
    e->in_flight++;
    e->calls++;
    if (e->last_used_ms < now_ms)
        e->last_used_ms = now_ms;
    e->in_flight--;
}

/* The same with the misses in the CPU's caches overlapped, as the table's batch does it. */
static void chash_hit_many(const chash *c, const char **ids, const size_t *lengths, size_t count,
                           int64_t now_ms) {
    size_t at[16];
    for (size_t i = 0; i < count; i++) {
        at[i] = chash_of(ids[i], lengths[i]) & c->mask;
        __builtin_prefetch(&c->places[at[i]]);
    }
    for (size_t i = 0; i < count; i++)
        __builtin_prefetch(c->places[at[i]]);
    for (size_t i = 0; i < count; i++)
        if (c->places[at[i]])
            __builtin_prefetch(c->places[at[i]]->id);
    for (size_t i = 0; i < count; i++)
        chash_hit(c, ids[i], lengths[i], now_ms);
}

static void chash_free(chash *c) {
    for (size_t at = 0; at <= c->mask; at++)
        if (c->places[at]) {
            free((void *)c->places[at]->id);
            free(c->places[at]);
        }
    free(c->places);
    free(c);
}
