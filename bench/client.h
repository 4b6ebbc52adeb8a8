/* One connection of the benchmark's own programs, whichever end of it they are: its session, and
 * what is written and read of it. Whoever includes this says OUT_BYTES, what a write takes at most.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

enum { OUT_SPARE = 20000, IN_BYTES = 1 << 17, EVENTS = 128 };

/* `sent` of `length` bytes in `out` have left. */
struct client {
  nghttp2_session *session;
  int socket;
  size_t length, sent;
  uint8_t out[OUT_BYTES];
};

/* Write until the session has nothing more or the socket is full. 0: the connection lives on. */
static int write_out(struct client *client) {
  for (;;) {
    while (client->sent < client->length) {
      ssize_t n = send(client->socket, client->out + client->sent, client->length - client->sent,
                       MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0) return 0; /* Full, or broken: then the next read says so. */
      client->sent += (size_t)n;
    }
    client->length = client->sent = 0;
    const uint8_t *piece;
    ssize_t n;
    while (client->length < OUT_BYTES - OUT_SPARE &&
           (n = nghttp2_session_mem_send(client->session, &piece)) != 0) {
      if (n < 0) return -1;
      memcpy(client->out + client->length, piece, (size_t)n);
      client->length += (size_t)n;
    }
    if (client->length == 0) return 0;
  }
}

/* Read what has come. 0: the connection lives on. */
static int read_in(struct client *client) {
  static uint8_t in[IN_BYTES];
  for (;;) {
    ssize_t n = recv(client->socket, in, sizeof in, MSG_DONTWAIT);
    if (n < 0) return 0;
    if (n == 0 || nghttp2_session_mem_recv(client->session, in, (size_t)n) < 0) return -1;
    if ((size_t)n < sizeof in) return 0;
  }
}

/* Begin to talk: the session is made, and the socket connected. 0: it is followed. */
static int begin(struct client *client, int poll, const nghttp2_settings_entry *settings,
                 size_t count) {
  int on = 1;
  setsockopt(client->socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  nghttp2_submit_settings(client->session, 0, settings, count);
  nghttp2_session_set_local_window_size(client->session, 0, 0, 1 << 30);
  struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = client};
  return epoll_ctl(poll, EPOLL_CTL_ADD, client->socket, &event);
}
