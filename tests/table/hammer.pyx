"""A reader as the wire will be: no GIL, real threads, everything checked that it sees.

Built on the fly by ``bench.building`` against the map of memory that the wire will use. What is
wrong is counted, never raised, so that a run tells all it saw.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp

from mm._lru cimport (
    BATCH,
    CHOSE_LOCAL,
    CHOSE_NONE,
    Table,
    choose_copy,
    find,
    find_alias,
    id_of,
    lookup_batch,
    pin,
    reader_offline,
    reader_online,
    reader_register,
    reader_unregister,
    report_load,
    slot_t,
    table_t,
    tag_of,
    touch,
    unpin,
)
from mm._lru_atomics cimport atomic_u32, cas_u32, load_u32, relaxed, store_u32

cdef enum:
    LOOKUPS = 32   # in a turn
    HELD = 6       # calls that outlive the turn they began in
    HANDLES = 64   # handles the writer has given out of late


cdef struct world_t:
    # What the writer and the readers share beside the table.
    atomic_u32 stopping
    atomic_u32 now_ms
    atomic_u32 handles[HANDLES]
    # By model: 1 while it is in memory. Deliberately not atomic: only a pin makes reading it sound.
    int *loaded


cdef struct report_t:
    # What one reader saw.
    uint64_t turns
    uint64_t found
    uint64_t missed
    uint64_t pinned
    uint64_t chosen
    uint64_t aliases
    uint64_t wrong_id
    uint64_t unloaded_while_pinned
    uint64_t wrong_choice


cdef class World:
    """The ids, and the memory of the models."""

    cdef world_t world
    cdef list kept
    cdef const char **ids
    cdef size_t *lengths
    cdef readonly int count

    def __cinit__(self, list ids):
        cdef int i
        self.kept = [each.encode() for each in ids]
        self.count = len(ids)
        self.ids = <const char **>calloc(self.count, sizeof(char *))
        self.lengths = <size_t *>calloc(self.count, sizeof(size_t))
        self.world.loaded = <int *>calloc(self.count, sizeof(int))
        if self.ids == NULL or self.lengths == NULL or self.world.loaded == NULL:
            raise MemoryError
        for i in range(self.count):
            self.ids[i] = <const char *><bytes>self.kept[i]
            self.lengths[i] = len(self.kept[i])

    def __dealloc__(self):
        free(self.ids)
        free(self.lengths)
        free(self.world.loaded)

    def set_loaded(self, int i, int value):
        """Say that the runtime has model ``i`` in memory, or no more."""
        self.world.loaded[i] = value

    def set_now(self, uint32_t now_ms):
        """Move time on for the readers."""
        store_u32(&self.world.now_ms, now_ms, relaxed)

    def set_handle(self, int place, uint32_t handle):
        """Tell the readers of a handle that they may report for, live or not."""
        store_u32(&self.world.handles[place], handle, relaxed)

    def stop(self):
        """Let every reader end after its turn."""
        store_u32(&self.world.stopping, 1, relaxed)


cdef inline uint64_t drawn(uint64_t *state) noexcept nogil:
    state[0] ^= state[0] << 13
    state[0] ^= state[0] >> 7
    state[0] ^= state[0] << 17
    return state[0]


cdef struct held_t:
    slot_t *slot
    uint32_t model


cdef void check_found(
    World world, slot_t *s, uint32_t model, report_t *report
) noexcept nogil:
    if (s.id_length != world.lengths[model]
            or memcmp(id_of(s), world.ids[model], s.id_length) != 0):
        report.wrong_id += 1


cdef void end_call(World world, held_t *held, report_t *report) noexcept nogil:
    if world.world.loaded[held.model] != 1:
        report.unloaded_while_pinned += 1
    check_found(world, held.slot, held.model, report)
    unpin(held.slot)
    held.slot = NULL


cdef void look_up(
    table_t *t, World world, uint64_t *state, held_t *held, report_t *report
) noexcept nogil:
    """One call as the wire makes it: find, pin or choose, touch, report."""
    cdef uint32_t model = <uint32_t>(drawn(state) % <uint64_t>world.count)
    cdef slot_t *s = find(t, world.ids[model], world.lengths[model])
    cdef held_t *place = &held[drawn(state) % HELD]
    cdef int64_t exclude = CHOSE_LOCAL
    cdef int64_t handle
    if s == t.slots:
        report.missed += 1
        return
    report.found += 1
    check_found(world, s, model, report)
    if place.slot != NULL:
        end_call(world, place, report)
    if pin(s):
        report.pinned += 1
        touch(s, load_u32(&world.world.now_ms, relaxed))
        place.slot = s
        place.model = model
        if world.world.loaded[model] != 1:
            report.unloaded_while_pinned += 1
        if drawn(state) & 1:
            end_call(world, place, report)
    handle = choose_copy(t, s, drawn(state), &exclude, drawn(state) & 1)
    if handle > 0:
        report.chosen += 1
        report_load(s, <uint32_t>handle, <uint32_t>drawn(state) & 15)
    elif handle != CHOSE_LOCAL and handle != CHOSE_NONE:
        report.wrong_choice += 1
    report_load(s, load_u32(&world.world.handles[drawn(state) % HANDLES], relaxed), 7)


cdef void look_up_many(
    table_t *t, World world, uint64_t *state, report_t *report
) noexcept nogil:
    cdef const char *ids[BATCH + 3]
    cdef size_t lengths[BATCH + 3]
    cdef uint32_t models[BATCH + 3]
    cdef slot_t *found[BATCH + 3]
    cdef int i
    for i in range(BATCH + 3):
        models[i] = <uint32_t>(drawn(state) % <uint64_t>world.count)
        ids[i] = world.ids[models[i]]
        lengths[i] = world.lengths[models[i]]
    lookup_batch(t, ids, lengths, BATCH + 3, found)
    for i in range(BATCH + 3):
        if found[i] == t.slots:
            report.missed += 1
        else:
            report.found += 1
            check_found(world, found[i], models[i], report)


cdef void run(
    table_t *t, World world, uint64_t seed, uint64_t turns_min, report_t *report
) noexcept nogil:
    cdef held_t held[HELD]
    cdef int reader = reader_register(t), i, _turn
    cdef uint64_t state = seed * 2 + 1
    cdef slot_t *s
    for i in range(HELD):
        held[i].slot = NULL
    while report.turns < turns_min or load_u32(&world.world.stopping, relaxed) == 0:
        reader_online(t, reader)
        for _turn in range(LOOKUPS):
            look_up(t, world, &state, held, report)
        look_up_many(t, world, &state, report)
        s = find_alias(t, b"v", 1)
        if s != t.slots:
            report.aliases += 1
            if s.id_length == 0:
                report.wrong_id += 1
        if drawn(&state) & 1:
            reader_offline(t, reader)  # the calls held stay pinned
        report.turns += 1
    reader_online(t, reader)
    for i in range(HELD):
        if held[i].slot != NULL:
            end_call(world, &held[i], report)
    reader_unregister(t, reader)


def read(Table table not None, World world not None, uint64_t seed, uint64_t turns_min):
    """Read until the world stops; answer what was seen. Holds no GIL meanwhile."""
    cdef report_t report = report_t(0, 0, 0, 0, 0, 0, 0, 0, 0)
    cdef table_t *t = table.core
    with nogil:
        run(t, world, seed, turns_min, &report)
    return report


def same_tag(Table table not None, list ids):
    """Answer the ids that share their tag with another one, in this table with its secret."""
    cdef bytes key
    groups = {}
    for each in ids:
        key = each.encode()
        groups.setdefault(tag_of(table.core, key, len(key)), []).append(each)
    return [each for each in groups.values() if len(each) > 1]


def found_at_once(Table table not None, list ids):
    """Answer, for each id, the id of the slot that the batch finds, None for none."""
    cdef World world = World(ids)
    cdef slot_t **found = <slot_t **>calloc(len(ids) + 1, sizeof(slot_t *))
    if found == NULL:
        raise MemoryError
    lookup_batch(table.core, world.ids, world.lengths, world.count, found)
    answer = []
    for i in range(world.count):
        if found[i] == table.core.slots:
            answer.append(None)
        else:
            answer.append((<bytes>id_of(found[i])[:found[i].id_length]).decode())
    free(found)
    return answer


cdef int planted = 0
cdef atomic_u32 arrived


def race():
    """Write one word from two threads at once: what ThreadSanitizer must report."""
    global planted
    cdef uint32_t before = 0
    with nogil:
        # relaxed: meeting here puts nothing in order. (Taking the GIL does, so not outside.)
        while not cas_u32(&arrived, &before, before + 1, relaxed, relaxed):
            pass
        while load_u32(&arrived, relaxed) < 2:
            pass
        planted += 1
    return planted


def overrun():
    """Read one word beyond a block: what AddressSanitizer must report."""
    cdef int *block = <int *>calloc(4, sizeof(int))
    if block == NULL:
        raise MemoryError
    value = block[4 + planted]
    free(block)
    return value
