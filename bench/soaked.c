/* The runtime of the soak: echoes every call, and counts it at its token.
 *
 *   soaked PORT COUNTS
 *
 * The file COUNTS, which several of these may share, has two bytes for each token: how often a call
 * with it came, and how often its answer was given whole. `soak-times` says how often its messages
 * go back: once, as they come; more often, when the request has ended; 0: the stream is reset. One
 * thread, epoll, nghttp2.
 *   cc -O2 -o soaked soaked.c -lnghttp2 */
#define _GNU_SOURCE
#define OUT_BYTES (1 << 16)
#include "client.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define HEADER(name, value) \
  { (uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, sizeof(value) - 1, 0 }

static const nghttp2_nv initial[] = {HEADER(":status", "200"),
                                     HEADER("content-type", "application/grpc")};
static const nghttp2_nv trailing[] = {HEADER("grpc-status", "0")};
static uint8_t *counts;
static long tokens;

/* `sent` of `length` bytes have gone back, `times` is how often they go. */
struct call {
  long token, times;
  size_t length, sent, room;
  int has_ended, is_told;
  uint8_t *bytes;
};

static void die(const char *what) {
  perror(what);
  exit(1);
}

static void count_one(long token, int which) {
  uint8_t *at = &counts[2 * token + which];
  uint8_t old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < 255 && !__atomic_compare_exchange_n(at, &old, old + 1, 0, __ATOMIC_RELAXED,
                                                   __ATOMIC_RELAXED)) {
  }
}

static ssize_t read_echo(nghttp2_session *session, int32_t stream, uint8_t *into, size_t room,
                         uint32_t *flags, nghttp2_data_source *source, void *user) {
  (void)user;
  struct call *call = source->ptr;
  size_t size = call->length - call->sent;
  if (call->times > 1 && !call->has_ended) return NGHTTP2_ERR_DEFERRED;
  if (size > room) size = room;
  if (size == 0 && !call->has_ended) return NGHTTP2_ERR_DEFERRED;
  if (size) memcpy(into, call->bytes + call->sent, size);
  call->sent += size;
  if (call->sent == call->length) {
    call->sent = 0;
    if (call->times > 1) call->times--;
    else if (call->length = 0, call->has_ended) {
      *flags = NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
      nghttp2_submit_trailer(session, stream, trailing, 1);
      call->is_told = 1;
    }
  }
  return (ssize_t)size;
}

static int on_begin(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
  (void)user;
  if (frame->hd.type != NGHTTP2_HEADERS) return 0;
  struct call *call = calloc(1, sizeof *call);
  if (call == NULL) die("calloc");
  call->token = -1;
  call->times = 1;
  nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, call);
  return 0;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
                     size_t name_size, const uint8_t *value, size_t size, uint8_t flags,
                     void *user) {
  (void)flags, (void)user, (void)size; /* nghttp2 ends values with a zero. */
  struct call *call = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
  if (call == NULL || name_size != 10) return 0;
  if (memcmp(name, "soak-token", 10) == 0) call->token = atol((const char *)value);
  if (memcmp(name, "soak-times", 10) == 0) call->times = atol((const char *)value);
  return 0;
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
  (void)user;
  int32_t stream = frame->hd.stream_id;
  if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
  struct call *call = nghttp2_session_get_stream_user_data(session, stream);
  if (call == NULL) return 0;
  if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
    if (call->token < 0 || call->token >= tokens) die("a call without a token of ours");
    count_one(call->token, 0);
    if (call->times == 0)
      return nghttp2_submit_rst_stream(session, 0, stream, NGHTTP2_INTERNAL_ERROR);
    nghttp2_data_provider body = {.source.ptr = call, .read_callback = read_echo};
    nghttp2_submit_response(session, stream, initial, 2, &body);
  }
  if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) {
    call->has_ended = 1;
    nghttp2_session_resume_data(session, stream);
  }
  return 0;
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t stream, const uint8_t *data,
                   size_t size, void *user) {
  (void)flags, (void)user;
  struct call *call = nghttp2_session_get_stream_user_data(session, stream);
  if (call == NULL) return 0;
  if (call->length + size > call->room) {
    call->room = 2 * (call->length + size);
    if ((call->bytes = realloc(call->bytes, call->room)) == NULL) die("realloc");
  }
  memcpy(call->bytes + call->length, data, size);
  call->length += size;
  nghttp2_session_resume_data(session, stream);
  return 0;
}

static int on_close(nghttp2_session *session, int32_t stream, uint32_t error, void *user) {
  (void)error, (void)user;
  struct call *call = nghttp2_session_get_stream_user_data(session, stream);
  if (call == NULL) return 0;
  nghttp2_session_set_stream_user_data(session, stream, NULL);
  if (call->is_told) count_one(call->token, 1);
  free(call->bytes);
  free(call);
  return 0;
}

static void accept_client(int listener, int poll, const nghttp2_session_callbacks *callbacks) {
  static const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, 10000},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 1 << 20}};
  int socket = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (socket < 0) return;
  struct client *client = calloc(1, sizeof *client);
  if (client == NULL) die("calloc");
  client->socket = socket;
  nghttp2_option *option;
  nghttp2_option_new(&option);
  /* The mesh passes on the cancellations of all clients. */
  nghttp2_option_set_stream_reset_rate_limit(option, 1u << 30, 1u << 30);
  /* Else the last ten thousand streams stay, each somewhere between the messages of others. */
  nghttp2_option_set_no_closed_streams(option, 1);
  nghttp2_session_server_new2(&client->session, callbacks, client, option);
  nghttp2_option_del(option);
  if (begin(client, poll, settings, 2) < 0) die("epoll_ctl");
}

static void end_client(struct client *client) {
  close(client->socket);
  /* Calls that are under way: nghttp2 does not tell of them. */
  for (int32_t stream = 1, last = nghttp2_session_get_last_proc_stream_id(client->session);
       stream <= last; stream += 2) {
    struct call *call = nghttp2_session_get_stream_user_data(client->session, stream);
    if (call) free(call->bytes);
    free(call);
  }
  nghttp2_session_del(client->session);
  free(client);
}

int main(int count, char **words) {
  if (count != 3) die("PORT COUNTS");
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  address.sin_port = htons((uint16_t)atoi(words[1]));
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), poll = epoll_create1(0), on = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  int file = open(words[2], O_RDWR);
  off_t size = file < 0 ? 0 : lseek(file, 0, SEEK_END);
  tokens = size / 2;
  counts = size > 0 ? mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)
                    : MAP_FAILED;
  if (counts == MAP_FAILED) die(words[2]);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 1024) < 0)
    die("listen");

  nghttp2_session_callbacks *callbacks;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
  nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
  struct epoll_event accepting = {.events = EPOLLIN, .data.ptr = NULL};
  epoll_ctl(poll, EPOLL_CTL_ADD, listener, &accepting);
  for (;;) {
    struct epoll_event events[EVENTS];
    int n = epoll_wait(poll, events, EVENTS, -1);
    for (int i = 0; i < n; i++) {
      struct client *client = events[i].data.ptr;
      if (client == NULL)
        accept_client(listener, poll, callbacks);
      else if (read_in(client) < 0 || write_out(client) < 0 || events[i].events & EPOLLHUP)
        end_client(client);
    }
  }
}
