// kstatus reads Kubernetes objects as JSON and prints, a line each, the status that the kstatus library computes of them: "InProgress<TAB>message".
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

func run(input io.Reader, output io.Writer) error {
	documents := json.NewDecoder(input)
	for {
		var document json.RawMessage
		if err := documents.Decode(&document); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		// Not encoding/json itself: kstatus wants whole numbers to be int64.
		object := &unstructured.Unstructured{}
		if err := object.UnmarshalJSON(document); err != nil {
			return err
		}
		result, err := status.Compute(object)
		if err != nil {
			return fmt.Errorf("%s %s: %w", object.GetKind(), object.GetName(), err)
		}
		fmt.Fprintf(output, "%s\t%s\n", result.Status, strings.ReplaceAll(result.Message, "\n", " "))
	}
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "kstatus:", err)
		os.Exit(1)
	}
}
