/* A gRPC server that answers every request alike, so that what stands before it is measured.
 *
 * Each stream gets one message of five bytes and grpc-status 0 as soon as its request ends; with
 * the argument "echo" it gets back what it sends, as it comes. One thread, epoll, nghttp2.
 *   cc -O2 -o upstream upstream.c -lnghttp2 && ./upstream [echo]
 * It binds a free port on 127.0.0.1 and prints it. */
#define _GNU_SOURCE
#define OUT_BYTES (1 << 16)
#include "client.h"
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define HEADER(name, value) \
  { (uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, sizeof(value) - 1, 0 }

static const uint8_t reply[] = "\0\0\0\0\5\n\3mmm";
static const nghttp2_nv initial[] = {HEADER(":status", "200"),
                                     HEADER("content-type", "application/grpc")};
static const nghttp2_nv trailing[] = {HEADER("grpc-status", "0")};

static void die(const char *what) {
  perror(what);
  exit(1);
}

static ssize_t read_reply(nghttp2_session *session, int32_t stream, uint8_t *into, size_t room,
                          uint32_t *flags, nghttp2_data_source *source, void *client) {
  (void)source, (void)client;
  const size_t size = sizeof reply - 1;
  if (room < size) return NGHTTP2_ERR_DEFERRED;
  memcpy(into, reply, size);
  *flags = NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
  nghttp2_submit_trailer(session, stream, trailing, 1);
  return (ssize_t)size;
}

static int answer_when_ended(nghttp2_session *session, const nghttp2_frame *frame, void *client) {
  (void)client;
  int ends = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
  if (ends && (frame->hd.type == NGHTTP2_DATA || frame->hd.type == NGHTTP2_HEADERS)) {
    nghttp2_data_provider body = {.read_callback = read_reply};
    nghttp2_submit_response(session, frame->hd.stream_id, initial, 2, &body);
  }
  return 0;
}

/* --- echo --- */

/* What came of a stream and has not gone back: `sent` of `length` bytes have. */
struct echo {
  size_t length, sent, room;
  int has_ended;
  uint8_t *bytes;
};

static ssize_t read_echo(nghttp2_session *session, int32_t stream, uint8_t *into, size_t room,
                         uint32_t *flags, nghttp2_data_source *source, void *client) {
  (void)client;
  struct echo *echo = source->ptr;
  size_t size = echo->length - echo->sent;
  if (size > room) size = room;
  if (size == 0 && !echo->has_ended) return NGHTTP2_ERR_DEFERRED;
  memcpy(into, echo->bytes + echo->sent, size);
  echo->sent += size;
  if (echo->sent == echo->length) {
    echo->sent = echo->length = 0;
    if (echo->has_ended) {
      *flags = NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
      nghttp2_submit_trailer(session, stream, trailing, 1);
    }
  }
  return (ssize_t)size;
}

static int echo_frame(nghttp2_session *session, const nghttp2_frame *frame, void *client) {
  (void)client;
  int32_t stream = frame->hd.stream_id;
  struct echo *echo = nghttp2_session_get_stream_user_data(session, stream);
  if (frame->hd.type == NGHTTP2_HEADERS && echo == NULL) {
    if ((echo = calloc(1, sizeof *echo)) == NULL) die("calloc");
    nghttp2_session_set_stream_user_data(session, stream, echo);
    nghttp2_data_provider body = {.source.ptr = echo, .read_callback = read_echo};
    nghttp2_submit_response(session, stream, initial, 2, &body);
  }
  if (echo != NULL && frame->hd.flags & NGHTTP2_FLAG_END_STREAM &&
      (frame->hd.type == NGHTTP2_DATA || frame->hd.type == NGHTTP2_HEADERS)) {
    echo->has_ended = 1;
    nghttp2_session_resume_data(session, stream);
  }
  return 0;
}

static int echo_data(nghttp2_session *session, uint8_t flags, int32_t stream, const uint8_t *data,
                     size_t size, void *client) {
  (void)flags, (void)client;
  struct echo *echo = nghttp2_session_get_stream_user_data(session, stream);
  if (echo->length + size > echo->room) {
    echo->room = 2 * (echo->length + size);
    if ((echo->bytes = realloc(echo->bytes, echo->room)) == NULL) die("realloc");
  }
  memcpy(echo->bytes + echo->length, data, size);
  echo->length += size;
  nghttp2_session_resume_data(session, stream);
  return 0;
}

static int echo_closed(nghttp2_session *session, int32_t stream, uint32_t error, void *client) {
  (void)error, (void)client;
  struct echo *echo = nghttp2_session_get_stream_user_data(session, stream);
  if (echo != NULL) free(echo->bytes);
  free(echo);
  return 0;
}

static void accept_client(int listener, int poll, const nghttp2_session_callbacks *callbacks) {
  static const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, 10000},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 1 << 24}};
  int socket = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
  if (socket < 0) return;
  struct client *client = calloc(1, sizeof *client);
  if (client == NULL) die("calloc");
  client->socket = socket;
  nghttp2_session_server_new(&client->session, callbacks, client);
  if (begin(client, poll, settings, 2) < 0) die("epoll_ctl");
}

int main(int count, char **words) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  socklen_t size = sizeof address;
  int listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0);
  if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 1024) < 0)
    die("listen");
  getsockname(listener, (struct sockaddr *)&address, &size);
  printf("%d\n", ntohs(address.sin_port));
  fflush(stdout);

  nghttp2_session_callbacks *callbacks;
  nghttp2_session_callbacks_new(&callbacks);
  if (count > 1 && strcmp(words[1], "echo") == 0) {
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, echo_frame);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, echo_data);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, echo_closed);
  } else {
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, answer_when_ended);
  }
  struct epoll_event accepting = {.events = EPOLLIN, .data.ptr = NULL};
  epoll_ctl(poll, EPOLL_CTL_ADD, listener, &accepting);
  for (;;) {
    struct epoll_event events[EVENTS];
    int count = epoll_wait(poll, events, EVENTS, -1);
    for (int i = 0; i < count; i++) {
      struct client *client = events[i].data.ptr;
      if (client == NULL) {
        accept_client(listener, poll, callbacks);
      } else if (read_in(client) < 0 || write_out(client) < 0) {
        close(client->socket);
        nghttp2_session_del(client->session);
        free(client);
      }
    }
  }
}
