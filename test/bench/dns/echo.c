//go:build ignore

// The floor of the benchmark: a UDP server that does nothing but read and write, a batch at a time, as fast as C can.
//
//	echo HOST PORT MORE
//
// Every packet is sent back with MORE bytes behind it, so that it is as long as a DNS server's answer.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define BATCH 32 // as Portolan reads and writes
#define ROOM 4096

static struct mmsghdr messages[BATCH];
static struct iovec parts[BATCH];
static struct sockaddr_in from[BATCH];
static char buffers[BATCH][ROOM];

int main(int argc, char **argv) {
	if (argc != 4) {
		fprintf(stderr, "usage: echo HOST PORT MORE\n");
		return 2;
	}
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
	size_t more = atoi(argv[3]);
	int receive = 4 << 20; // as Portolan asks for
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	setsockopt(s, SOL_SOCKET, SO_RCVBUF, &receive, sizeof receive);
	if (inet_pton(AF_INET, argv[1], &at.sin_addr) != 1 || more > ROOM / 2 || bind(s, (struct sockaddr *)&at, sizeof at) != 0) {
		perror("echo");
		return 1;
	}
	for (int i = 0; i < BATCH; i++) {
		parts[i].iov_base = buffers[i];
		messages[i].msg_hdr.msg_iov = &parts[i];
		messages[i].msg_hdr.msg_iovlen = 1;
		messages[i].msg_hdr.msg_name = &from[i];
	}
	for (;;) {
		for (int i = 0; i < BATCH; i++) {
			parts[i].iov_len = ROOM - more;
			messages[i].msg_hdr.msg_namelen = sizeof from[i];
		}
		int n = recvmmsg(s, messages, BATCH, MSG_WAITFORONE, NULL);
		for (int i = 0; i < n; i++)
			parts[i].iov_len = messages[i].msg_len + more;
		for (int sent = 0; sent < n;) {
			int k = sendmmsg(s, messages + sent, n - sent, 0);
			sent += k > 0 ? k : 1; // one that cannot be sent is left out
		}
	}
}
