/* The client of the soak: mixed gRPC calls to several instances, each of which carries its token.
 *
 *   soaker PORTS CONNECTIONS STREAMS FIRST CALLS SECONDS MODELS VMODELS OUTCOMES SEED
 *
 * PORTS with commas between; so many connections to each, so many calls at a time on each. Calls
 * have the tokens from FIRST on; no more begin after so many seconds. What came of a call is one
 * byte at its token in the file OUTCOMES: 1 answered, 2 cancelled here, 3 lost with its connection,
 * 4 reset as it asked for, 99 ended without a status, 100 + its gRPC status otherwise. A message is its token over and over,
 * and the runtime echoes it: an answer with anything else in it ends the program with 1. Connections
 * that break are made anew. Prints a line a second, and another when all calls have ended: calls
 * begun, and those that were answered, cancelled, lost, reset and refused. And one for each that was
 * refused: "refused", its token, its port, its status, 1 if its answer had begun, and grpc-message.
 * With calls left after two minutes without an answer it ends with 2. One thread, epoll, nghttp2.
 *   cc -O2 -o soaker soaker.c -lnghttp2 */
#define _GNU_SOURCE
#define OUT_BYTES (1 << 17)
#include "client.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { ANSWERED = 1, CANCELLED, LOST, RESET, STATUSLESS = 99, REFUSED };
enum { PREFIX = 5, PORTS_MAX = 8, HUNG_MS = 120000, AGAIN_MS = 200, TEXT_BYTES = 256 };
/* What becomes of a call, if all goes well. */
enum fate { WHOLE, CANCEL_EARLY, CANCEL_LATE, ABANDON, RESET_THERE };

struct connection {
  struct client client; /* First: epoll names it. */
  int port, is_open, calls_left;
  uint64_t again_ms;
  struct call *calls;
};

struct call {
  struct call *previous, *next;
  struct connection *connection;
  long token;
  int32_t stream;
  enum fate fate;
  int status, takes_turns, may_end, has_cancelled, has_begun;
  char text[TEXT_BYTES];
  size_t message_bytes, to_send, sent, expected, came;
  uint8_t message[];
};

static long token_next, token_end, begun, open_calls, models, vmodels;
static long totals[5];
static uint8_t *outcomes;
static int poller;
static uint64_t now_ms, answered_ms, state;
static nghttp2_session_callbacks *callbacks;

static void die(const char *what) {
  fprintf(stderr, "soaker: %s (%s)\n", what, strerror(errno));
  exit(1);
}

static uint64_t clock_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static uint64_t draw(uint64_t below) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return (state >> 11) % below;
}

static void settle(struct call *call, uint8_t outcome) {
  struct connection *connection = call->connection;
  if (outcomes[call->token]) die("a call ended twice");
  outcomes[call->token] = outcome;
  if (outcome > REFUSED)
    printf("refused %ld %d %d %d %s\n", call->token, connection->port, outcome - REFUSED,
           call->has_begun, call->text);
  totals[outcome >= STATUSLESS ? 4 : outcome - 1]++;
  if (call->previous) call->previous->next = call->next;
  else connection->calls = call->next;
  if (call->next) call->next->previous = call->previous;
  free(call);
  open_calls--;
  answered_ms = now_ms;
}

static void cancel(struct call *call) {
  call->has_cancelled = 1;
  nghttp2_submit_rst_stream(call->connection->client.session, 0, call->stream, NGHTTP2_CANCEL);
}

static ssize_t read_request(nghttp2_session *session, int32_t stream, uint8_t *into, size_t room,
                            uint32_t *flags, nghttp2_data_source *source, void *user) {
  (void)session, (void)stream, (void)user;
  struct call *call = source->ptr;
  size_t left = call->to_send - call->sent;
  if (call->fate == CANCEL_EARLY && !call->has_cancelled && draw(2)) {
    cancel(call);
    return NGHTTP2_ERR_DEFERRED;
  }
  if (left == 0) {
    if (!call->may_end) return NGHTTP2_ERR_DEFERRED;
    *flags = NGHTTP2_DATA_FLAG_EOF;
    return 0;
  }
  size_t at = call->sent % call->message_bytes, n = call->message_bytes - at;
  if (call->takes_turns && at == 0 && call->came < call->sent) return NGHTTP2_ERR_DEFERRED;
  if (n > room) n = room;
  memcpy(into, call->message + at, n);
  call->sent += n;
  if (call->sent == call->to_send && call->may_end) *flags = NGHTTP2_DATA_FLAG_EOF;
  return (ssize_t)n;
}

#define HEADER(name, value, size) \
  { (uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, size, NGHTTP2_NV_FLAG_NONE }
#define FIXED(name, value) HEADER(name, value, sizeof(value) - 1)

/* One of the kinds: its messages, and how many times it wants them back. */
static struct call *new_call(long *times) {
  size_t bytes = 16 + draw(200), messages = 1;
  int takes_turns = 0;
  uint64_t kind = draw(1000);
  *times = 1;
  if (kind < 10) bytes = 100000 + draw(200000);
  else if (kind < 60) messages = 2 + draw(10);                    /* up */
  else if (kind < 110) *times = 2 + (long)draw(10);               /* down */
  else if (kind < 180) messages = 2 + draw(6), takes_turns = 1;   /* both, by turns */
  struct call *call = calloc(1, sizeof *call + PREFIX + bytes + 8);
  if (call == NULL) die("no memory");
  call->message_bytes = PREFIX + bytes;
  call->to_send = messages * call->message_bytes;
  call->expected = call->to_send * (size_t)*times;
  call->takes_turns = takes_turns;
  call->may_end = 1;
  call->status = -1;
  call->token = token_next++;
  for (int i = 0; i < 4; i++) call->message[1 + i] = (uint8_t)(bytes >> (24 - 8 * i));
  for (size_t at = PREFIX; at < PREFIX + bytes; at += 8)
    memcpy(call->message + at, &call->token, sizeof call->token);
  uint64_t fate = draw(1000);
  call->fate = fate < 15 ? CANCEL_EARLY : fate < 30 ? CANCEL_LATE : fate < 35 ? ABANDON
               : fate < 40 ? RESET_THERE : WHOLE;
  if (call->fate == ABANDON) {
    if (*times > 1) call->fate = WHOLE; /* Those come only when the request has ended. */
    else call->may_end = 0;
  }
  return call;
}

static void begin_call(struct connection *connection) {
  char id[40], token[24], repeat[24];
  long times;
  struct call *call = new_call(&times);
  int is_vmodel = vmodels && draw(10) == 0;
  long count = is_vmodel ? vmodels : models;
  /* Most for a few that are always loaded, some for any of them. */
  long number = (long)draw((uint64_t)(draw(300) && count > 4 ? 4 : count));
  int id_size = snprintf(id, sizeof id, "%s-%04ld", is_vmodel ? "vmodel" : "model", number);
  int token_size = snprintf(token, sizeof token, "%ld", call->token);
  int repeat_size = snprintf(repeat, sizeof repeat, "%ld", call->fate == RESET_THERE ? 0 : times);
  nghttp2_nv headers[] = {
      FIXED(":method", "POST"),
      FIXED(":scheme", "http"),
      FIXED(":authority", "127.0.0.1"),
      FIXED(":path", "/bench.Service/Method"),
      FIXED("content-type", "application/grpc"),
      FIXED("te", "trailers"),
      FIXED("grpc-timeout", "30S"),
      HEADER("soak-token", token, (size_t)token_size),
      HEADER("soak-times", repeat, (size_t)repeat_size),
      HEADER("mm-model-id", id, (size_t)id_size),
  };
  if (is_vmodel) headers[9].name = (uint8_t *)"mm-vmodel-id", headers[9].namelen = 12;
  nghttp2_data_provider body = {.source.ptr = call, .read_callback = read_request};
  nghttp2_session *session = connection->client.session;
  call->stream = nghttp2_submit_request(session, NULL, headers, 10, &body, call);
  if (call->stream < 0) die("no stream");
  call->connection = connection;
  call->next = connection->calls;
  if (call->next) call->next->previous = call;
  connection->calls = call;
  begun++, open_calls++, connection->calls_left--;
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t stream, const uint8_t *data,
                   size_t size, void *user) {
  (void)flags, (void)user;
  struct call *call = nghttp2_session_get_stream_user_data(session, stream);
  if (call == NULL) return 0;
  while (size) {
    size_t at = call->came % call->message_bytes, n = call->message_bytes - at;
    if (n > size) n = size;
    if (call->came + n > call->expected || memcmp(data, call->message + at, n)) {
      fprintf(stderr, "soaker: call %ld got the answer of another\n", call->token);
      exit(1);
    }
    call->came += n, data += n, size -= n;
  }
  if (call->takes_turns) nghttp2_session_resume_data(session, stream);
  if (call->has_cancelled) return 0;
  if (call->fate == CANCEL_EARLY || call->fate == CANCEL_LATE) {
    if (call->fate == CANCEL_EARLY || call->came > call->expected / 2) cancel(call);
  } else if (call->fate == ABANDON && call->came == call->expected) {
    cancel(call);
  }
  return 0;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
                     size_t name_size, const uint8_t *value, size_t size, uint8_t flags,
                     void *user) {
  (void)flags, (void)user;
  struct call *call = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
  if (call == NULL) return 0;
  if (name_size == 11 && memcmp(name, "grpc-status", 11) == 0)
    call->status = size == 1 ? value[0] - '0' : 10 + value[1] - '0';
  if (name_size == 12 && memcmp(name, "grpc-message", 12) == 0)
    snprintf(call->text, sizeof call->text, "%s", (const char *)value);
  if (!(frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) call->has_begun = 1;
  return 0;
}

static int on_close(nghttp2_session *session, int32_t stream, uint32_t error, void *user) {
  (void)user;
  struct call *call = nghttp2_session_get_stream_user_data(session, stream);
  if (call == NULL) return 0;
  if (call->has_cancelled) settle(call, CANCELLED);
  else if (call->status == 0 && (error || call->came != call->expected)) die("half an answer");
  else if (call->status == 0) settle(call, ANSWERED);
  else if (call->status > 0) settle(call, call->fate == RESET_THERE ? RESET : REFUSED + call->status);
  else settle(call, error == NGHTTP2_REFUSED_STREAM ? REFUSED + 14 : STATUSLESS);
  return 0;
}

static void drop(struct connection *connection) {
  while (connection->calls)
    settle(connection->calls, connection->calls->has_cancelled ? CANCELLED : LOST);
  nghttp2_session_del(connection->client.session);
  close(connection->client.socket);
  memset(&connection->client, 0, sizeof connection->client);
  connection->is_open = 0;
  connection->again_ms = now_ms + AGAIN_MS;
}

static void open_connection(struct connection *connection) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  static const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 1 << 20}};
  struct client *client = &connection->client;
  address.sin_port = htons((uint16_t)connection->port);
  connection->again_ms = now_ms + AGAIN_MS;
  client->socket = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(client->socket, (struct sockaddr *)&address, sizeof address) < 0) {
    close(client->socket);
    return;
  }
  nghttp2_session_client_new(&client->session, callbacks, client);
  if (begin(client, poller, settings, 1) < 0) die("epoll_ctl");
  connection->is_open = 1;
  connection->calls_left = 2000 + (int)draw(40000);
}

static void fill(struct connection *connection, long streams) {
  long count = 0;
  for (struct call *call = connection->calls; call; call = call->next) count++;
  for (; count < streams && token_next < token_end; count++) {
    if (!nghttp2_session_check_request_allowed(connection->client.session)) break;
    begin_call(connection);
  }
}

static void tell(void) {
  printf("%ld %ld %ld %ld %ld %ld\n", begun, totals[0], totals[1], totals[2], totals[3], totals[4]);
  fflush(stdout);
}

/* Give each connection what it is to do now. */
static void tend(struct connection *connections, int count, long streams) {
  for (int i = 0; i < count; i++) {
    struct connection *each = &connections[i];
    if (!each->is_open && token_next < token_end && now_ms >= each->again_ms) open_connection(each);
    if (!each->is_open) continue;
    /* Sometimes a client is gone at once, with all that it has asked for. */
    if (each->calls_left <= 0) {
      drop(each);
      continue;
    }
    fill(each, streams);
    if (write_out(&each->client) < 0 ||
        !(nghttp2_session_want_read(each->client.session) ||
          nghttp2_session_want_write(each->client.session)))
      drop(each);
  }
}

static void run(struct connection *connections, int count, long streams, uint64_t until_ms) {
  uint64_t told_ms = now_ms;
  while (open_calls > 0 || token_next < token_end) {
    struct epoll_event events[EVENTS];
    tend(connections, count, streams);
    int n = epoll_wait(poller, events, EVENTS, 50);
    now_ms = clock_ms();
    for (int i = 0; i < n; i++) {
      struct connection *connection = events[i].data.ptr;
      if (!connection->is_open) continue;
      if (read_in(&connection->client) < 0 || events[i].events & (EPOLLHUP | EPOLLERR))
        drop(connection);
    }
    if (now_ms >= until_ms) token_end = token_next;
    if (now_ms - told_ms >= 1000) tell(), told_ms = now_ms;
    if (open_calls && now_ms - answered_ms > HUNG_MS) {
      fprintf(stderr, "soaker: %ld calls have no answer\n", open_calls);
      exit(2);
    }
  }
}

int main(int count, char **words) {
  if (count != 11) die("PORTS CONNECTIONS STREAMS FIRST CALLS SECONDS MODELS VMODELS OUTCOMES SEED");
  int ports[PORTS_MAX], ports_count = 0, each = atoi(words[2]);
  for (char *port = strtok(words[1], ","); port && ports_count < PORTS_MAX; port = strtok(NULL, ","))
    ports[ports_count++] = atoi(port);
  token_next = atol(words[4]), token_end = token_next + atol(words[5]);
  models = atol(words[7]), vmodels = atol(words[8]);
  state = strtoull(words[10], NULL, 10) * 0x9E3779B97F4A7C15u | 1;
  int file = open(words[9], O_RDWR);
  off_t size = file < 0 ? 0 : lseek(file, 0, SEEK_END);
  if (size < token_end) die("OUTCOMES is too small");
  outcomes = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (outcomes == MAP_FAILED) die("mmap");

  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
  poller = epoll_create1(EPOLL_CLOEXEC);
  now_ms = answered_ms = clock_ms();
  int total = each * ports_count;
  struct connection *connections = calloc((size_t)total, sizeof *connections);
  for (int i = 0; i < total; i++) connections[i].port = ports[i % ports_count];
  run(connections, total, atol(words[3]), now_ms + strtoull(words[6], NULL, 10) * 1000);
  tell();
  return 0;
}
