package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// terminal reports whether somebody can be asked on the other side of in.
func terminal(in io.Reader) bool {
	f, ok := in.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// confirm asks for the name of what is about to be deleted, and fails unless that is the answer.
func (a *app) confirm(ctx context.Context, in io.Reader, name string) error {
	fmt.Fprintf(a.stderr, "Type %s to delete it: ", name)
	answer := make(chan string, 1)
	go func() { // a read of a terminal cannot be ended: it goes with the process
		line, _ := bufio.NewReader(in).ReadString('\n')
		answer <- strings.TrimSpace(line)
	}()
	select {
	case typed := <-answer:
		if typed != name {
			return fmt.Errorf("%q is not %s: nothing was deleted", typed, name)
		}
		return nil
	case <-ctx.Done():
		fmt.Fprintln(a.stderr)
		return ctx.Err()
	}
}
