/* A gRPC client for what h2load cannot do: to cost less than the wire does, a model of its own for
 * each call, and streams in which each message waits for the answer to the one before.
 *
 *   caller PORT CONNECTIONS STREAMS CALLS MODELS MESSAGES
 *
 * So many calls in all, so many at a time on each connection. Calls are for one of so many models,
 * by Zipf's law (the same ones in every run); their ids are never indexed, so that one model costs
 * HPACK what many do. MODELS 0: for one, whose id is indexed as any other header. MESSAGES 0: a call is a message of 200 bytes, answered by one. Else it is so many
 * of 100 bytes, each sent when the one before came back. Prints the seconds, how many answers there
 * were, and p50 and p99 of the microseconds to each. Exits with 1 and a text for any answer that is
 * not whole, with grpc-status 0. One thread, epoll, nghttp2.
 *   cc -O2 -o caller caller.c -lnghttp2 */
#define _GNU_SOURCE
#define OUT_BYTES (1 << 17)
#include "client.h"
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { UNARY_BYTES = 205, UNARY_REPLY_BYTES = 10, STREAM_BYTES = 105 };

struct call {
  int left;             /* Messages not sent yet, this one included. */
  size_t at;            /* Of this message sent. */
  size_t awaited, came; /* Bytes of answers: that belong to what was sent, and that came. */
  uint64_t began_ns;
  int is_good;
};

static long calls_left, calls_open, models, messages, answers, answers_max;
static double *shares;
static uint32_t *took_us;
static const uint8_t unary[UNARY_BYTES] = {0, 0, 0, 0, 200};
static const uint8_t streamed[STREAM_BYTES] = {0, 0, 0, 0, 100};

static void die(const char *what) {
  fprintf(stderr, "caller: %s\n", what);
  exit(1);
}

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static long pick_model(void) {
  static uint64_t state = 88172645463325252u;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  double drawn = (double)(state >> 11) / 9007199254740992.0;
  long low = 0, high = models - 1;
  while (low < high) {
    long middle = (low + high) / 2;
    if (shares[middle] > drawn)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

static void note_answer(struct call *call) {
  uint64_t now = now_ns();
  if (answers < answers_max) took_us[answers] = (uint32_t)((now - call->began_ns) / 1000);
  answers++;
  call->began_ns = now;
}

static ssize_t read_request(nghttp2_session *session, int32_t stream, uint8_t *into, size_t room,
                            uint32_t *flags, nghttp2_data_source *source, void *user) {
  (void)session, (void)stream, (void)user;
  struct call *call = source->ptr;
  size_t size = messages ? STREAM_BYTES : UNARY_BYTES, n = size - call->at;
  if (call->left == 0) {
    *flags = NGHTTP2_DATA_FLAG_EOF;
    return 0;
  }
  if (call->at == 0 && call->came < call->awaited) return NGHTTP2_ERR_DEFERRED;
  if (call->at == 0) call->awaited += messages ? STREAM_BYTES : UNARY_REPLY_BYTES;
  if (n > room) n = room;
  memcpy(into, (messages ? streamed : unary) + call->at, n);
  call->at += n;
  if (call->at == size) {
    call->at = 0;
    call->left--;
    if (!messages) *flags = NGHTTP2_DATA_FLAG_EOF;
  }
  return (ssize_t)n;
}

#define HEADER(name, value, size, flags) \
  { (uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, size, flags }
#define FIXED(name, value) HEADER(name, value, sizeof(value) - 1, NGHTTP2_NV_FLAG_NONE)

static void begin_call(struct client *client) {
  char id[40];
  int size = snprintf(id, sizeof id, "model-%07ld__isvc-0123456789", pick_model());
  nghttp2_nv headers[] = {
      FIXED(":method", "POST"),
      FIXED(":scheme", "http"),
      FIXED(":authority", "127.0.0.1"),
      FIXED(":path", "/bench.Service/Method"),
      FIXED("content-type", "application/grpc"),
      FIXED("te", "trailers"),
      HEADER("mm-model-id", id, (size_t)size,
             models ? NGHTTP2_NV_FLAG_NO_INDEX : NGHTTP2_NV_FLAG_NONE),
  };
  struct call *call = calloc(1, sizeof *call);
  if (call == NULL) die("no memory");
  call->left = messages ? (int)messages : 1;
  call->began_ns = now_ns();
  nghttp2_data_provider body = {.source.ptr = call, .read_callback = read_request};
  if (nghttp2_submit_request(client->session, NULL, headers, 7, &body, call) < 0) die("no stream");
  calls_left--, calls_open++;
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t stream, const uint8_t *data,
                   size_t size, void *user) {
  (void)flags, (void)data, (void)user;
  struct call *call = nghttp2_session_get_stream_user_data(session, stream);
  call->came += size;
  if (call->came == call->awaited) {
    note_answer(call);
    if (messages) nghttp2_session_resume_data(session, stream);
  }
  return 0;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
                     size_t name_size, const uint8_t *value, size_t size, uint8_t flags,
                     void *user) {
  (void)flags, (void)user;
  if (name_size == 11 && memcmp(name, "grpc-status", 11) == 0) {
    struct call *call = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    call->is_good = size == 1 && value[0] == '0';
  }
  return 0;
}

static int on_close(nghttp2_session *session, int32_t stream, uint32_t error, void *user) {
  struct client *client = user;
  struct call *call = nghttp2_session_get_stream_user_data(session, stream);
  if (error != 0 || !call->is_good || call->left || call->came != call->awaited)
    die("an answer was not whole, or not with grpc-status 0");
  free(call);
  calls_open--;
  if (calls_left > 0) begin_call(client);
  return 0;
}

static struct client *connect_to(int port, int poll, const nghttp2_session_callbacks *callbacks) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  static const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 1 << 24}};
  struct client *client = calloc(1, sizeof *client);
  address.sin_port = htons((uint16_t)port);
  if (client == NULL) die("no memory");
  client->socket = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(client->socket, (struct sockaddr *)&address, sizeof address) < 0) die("connect");
  nghttp2_session_client_new(&client->session, callbacks, client);
  if (begin(client, poll, settings, 1) < 0) die("epoll_ctl");
  return client;
}

static void prepare_models(void) {
  double sum = 0;
  shares = calloc((size_t)models, sizeof *shares);
  took_us = calloc((size_t)answers_max, sizeof *took_us);
  if (shares == NULL || took_us == NULL) die("no memory");
  for (long i = 0; i < models; i++) shares[i] = sum += 1.0 / (double)(i + 1);
  for (long i = 0; i < models; i++) shares[i] /= sum;
}

static int ascending(const void *a, const void *b) {
  uint32_t one = *(const uint32_t *)a, other = *(const uint32_t *)b;
  return one < other ? -1 : one > other;
}

int main(int count, char **words) {
  if (count != 7) die("PORT CONNECTIONS STREAMS CALLS MODELS MESSAGES");
  int connections = atoi(words[2]), streams = atoi(words[3]), poll = epoll_create1(0);
  calls_left = atol(words[4]), models = atol(words[5]), messages = atol(words[6]);
  answers_max = calls_left * (messages ? messages : 1);
  prepare_models();

  nghttp2_session_callbacks *callbacks;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
  uint64_t began = now_ns();
  for (int i = 0; i < connections; i++) {
    struct client *client = connect_to(atoi(words[1]), poll, callbacks);
    for (int j = 0; j < streams && calls_left > 0; j++) begin_call(client);
    if (write_out(client) < 0) die("the session broke");
  }
  while (calls_open > 0) {
    struct epoll_event events[EVENTS];
    int n = epoll_wait(poll, events, EVENTS, 60000);
    if (n == 0) die("nothing came for a minute");
    for (int i = 0; i < n; i++) {
      struct client *client = events[i].data.ptr;
      if (read_in(client) < 0 || write_out(client) < 0) die("the connection broke");
    }
  }
  double seconds = (double)(now_ns() - began) / 1e9;
  if (answers != answers_max) die("not as many answers as questions");
  qsort(took_us, (size_t)answers, sizeof *took_us, ascending);
  printf("%.6f %ld %u %u\n", seconds, answers, took_us[answers / 2], took_us[answers * 99 / 100]);
  return 0;
}
